"""Which generation of the workers' process group a save uses: agreed at the begin of each save.

Every worker says in which group it is. If all are in one, that is it; else all of them make a new
one, under a number that no rank has seen. Belongs here: that step. Does not belong here: making
the group (``executors.process.group``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

import msgspec

from dcp_engine.async_saver.lost_worker import heeding_a_lost_worker
from dcp_engine.coordination.interface import Decision, Operation

__all__ = ["alone", "join_group", "stay_out_of_group"]

_LOOK = 0.1
"""Seconds between two looks at the other ranks while the group is made."""
NO_GROUP = 0
"""A save without a process group of the workers, because a rank has no worker in it."""


class _Offer(msgspec.Struct, array_like=True):
    joined: int
    """The generation that this worker is in; ``NO_GROUP`` if in none."""
    seen: int
    """The latest generation that this rank has heard of."""
    joins: bool


def join_group(
    operation: Operation,
    *,
    joined: int,
    seen: int,
    ensure: Callable[[int], None],
    before: Callable[[], None],
) -> int:
    """Agree on a generation and be in it; returns it.

    Args:
        joined: the generation that this worker is in, 0 for none.
        seen: the latest generation that this rank has heard of.
        ensure: makes the group of a generation, with all other ranks. Called on a thread that
            is left behind if another rank fails meanwhile: such a worker is of no more use.
        before: called first, so that what it raises is this rank's failure to all.
    """
    offer = _Offer(joined=joined, seen=max(seen, joined), joins=True)
    generation = _agree(operation, offer, before)
    if generation != NO_GROUP:

        def join() -> bytes:
            _run_checked(lambda: ensure(generation), operation.check)
            return b""

        operation.step("join", join, lambda _: Decision())
    return generation


def _run_checked(call: Callable[[], None], check: Callable[[], None]) -> None:
    """Gloo waits for a rank that died for as long as its timeout is."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            call()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="dcp_engine-join", daemon=True).start()
    while not wait([done], timeout=_LOOK).done:
        check()
    heeding_a_lost_worker(done.result, check)


def stay_out_of_group(operation: Operation) -> None:
    """This rank takes part in the save, but not by a worker."""
    _agree(operation, _Offer(joined=NO_GROUP, seen=0, joins=False), lambda: None)


def alone(operation: Operation, before: Callable[[], None]) -> None:
    """The step of a rank that saves without others, and needs no group."""
    _agree(operation, _Offer(joined=NO_GROUP, seen=0, joins=False), before)


def _agree(operation: Operation, offer: _Offer, before: Callable[[], None]) -> int:
    def local() -> bytes:
        before()
        return msgspec.msgpack.encode(offer)

    def decide(messages: list[bytes]) -> Decision:
        offers = [msgspec.msgpack.decode(message, type=_Offer) for message in messages]
        return Decision(common=msgspec.msgpack.encode(_chosen(offers)))

    common, _ = operation.step("group", local, decide)
    return msgspec.msgpack.decode(common, type=int)


def _chosen(offers: list[_Offer]) -> int:
    if not all(offer.joins for offer in offers):
        return NO_GROUP
    joined = {offer.joined for offer in offers}
    if len(joined) == 1 and joined != {NO_GROUP}:
        return joined.pop()
    return max(offer.seen for offer in offers) + 1
