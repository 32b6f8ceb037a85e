"""What the store thread of an operation does, whichever rank it is.

Belongs here: the interface between the calling thread and the store thread of an operation, and
what coordinator and participants have in common (flags, leaving, cleaning up). Does not belong
here: who decides (``coordinator_role``) and who obeys (``participant_role``).
"""

from __future__ import annotations

import abc
import threading
from concurrent.futures import Future
from dataclasses import dataclass

from dcp_engine.coordination.clock import OperationClock
from dcp_engine.coordination.failures import FailureRecord
from dcp_engine.coordination.interface import Outcome
from dcp_engine.coordination.keys import OperationKeys
from dcp_engine.coordination.messages import FailureVerdict, Heading, decode, encode
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.store_client import StoreClient
from dcp_engine.coordination.words import EVENT, FAILURE

__all__ = [
    "Failed",
    "Granted",
    "Reply",
    "Role",
    "RoleContext",
    "announce_failure",
    "leave",
    "propose",
]

_LEAVER_BITS = 24
_UNCLEAN = 1 << _LEAVER_BITS


@dataclass(frozen=True, kw_only=True)
class RoleContext:
    """What a role is made of."""

    client: StoreClient
    keys: OperationKeys
    heading: Heading
    rank: int
    world_size: int
    rhythm: Rhythm
    clock: OperationClock


@dataclass(frozen=True, kw_only=True)
class Granted:
    """The step went well."""

    reports: list[bytes] | None = None
    """For the coordinator, before it decides."""
    common: bytes = b""
    answer: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The operation is over."""

    verdict: FailureVerdict


Reply = Granted | Failed


def announce_failure(client: StoreClient, keys: OperationKeys, record: FailureRecord) -> None:
    """Publish a failure of a rank that is not the coordinator, and count it last, so that what
    is counted is there."""
    index = client.add(keys.failures, 1)
    client.set(keys.failure(index), encode(record))
    client.add(keys.tally, FAILURE)


def propose(client: StoreClient, keys: OperationKeys, verdict: FailureVerdict) -> FailureVerdict:
    """Propose how the operation failed; return the first proposal, which holds for all ranks."""
    return decode(client.compare_set(keys.outcome, encode(verdict)), FailureVerdict)


def leave(client: StoreClient, keys: OperationKeys, *, world_size: int, clean: bool) -> None:
    """Count a rank that has left, and if it is the last one remove all keys of the operation.

    Args:
        clean: the rank has removed its own keys.
    """
    left = client.add(keys.leavers, 1 if clean else 1 + _UNCLEAN)
    if left & (_UNCLEAN - 1) == world_size:
        _remove_shared(client, keys, world_size=world_size, all_ranks=left >= _UNCLEAN)


def _remove_shared(
    client: StoreClient, keys: OperationKeys, *, world_size: int, all_ranks: bool
) -> None:
    events = client.add(keys.tally, 0) // EVENT
    first = int(client.get(keys.first_event)) if client.check([keys.first_event]) else 1
    left = [keys.event(index) for index in range(first, events + 1)]
    if not client.check(left):  # the coordinator died between counting and removing
        left = [key for key in left if client.check([key])]
    for key, pieces in client.pieces_of(left).items():
        client.delete_pieces(key, pieces)
        client.delete(key)
    for index in range(1, client.add(keys.failures, 0) + 1):
        client.delete(keys.failure(index))
    if all_ranks:
        for rank in range(world_size):
            for key in (keys.report(rank), keys.answer(rank), keys.pulse(rank)):
                client.delete(key)
    for key in keys.shared:
        client.delete(key)


class Role(abc.ABC):
    """Lives on the store thread; only ``alarm`` is read by others."""

    def __init__(self, context: RoleContext) -> None:
        self.context = context
        self.client = context.client
        self.keys = context.keys
        self.rhythm = context.rhythm
        self.clock = context.clock
        self.rank = context.rank
        self.world_size = context.world_size
        self.alarm = threading.Event()
        self.outcome: FailureVerdict | None = None
        self.step = -1
        self.pending: Future[Reply] | None = None
        self.left = False
        """The keys are removed, and whatever is written from now on would stay for ever."""

    @abc.abstractmethod
    def turn(self) -> float:
        """Do what is due; return the seconds after which there will be something to do."""

    @abc.abstractmethod
    def begin_step(self, step: int, phase: str, decide_phase: str) -> None:
        """The calling thread runs ``local``."""

    @abc.abstractmethod
    def report(self, payload: bytes, phase: str, reply: Future[Reply]) -> None:
        """``local`` returned. ``reply`` is set when all ranks have (coordinator) or when the
        verdict is there (others)."""

    @abc.abstractmethod
    def fail(self, record: FailureRecord, reply: Future[Reply]) -> None:
        """``local`` or ``decide`` raised. ``reply`` is set when the failure verdict is there."""

    @abc.abstractmethod
    def abandon(self, record: FailureRecord) -> None:
        """This rank leaves the operation by an error and waits for nobody."""

    @abc.abstractmethod
    def depart(self) -> None:
        """Last call: remove what this rank alone is to remove."""

    def decide_once(self, outcome: Outcome) -> Outcome:
        """The first proposal of any rank wins."""
        held = self.client.compare_set(self.keys.decision, outcome.encode())
        return "commit" if held == b"commit" else "abort"

    def break_off(self, error: BaseException) -> None:
        """The store thread cannot go on."""
        self._resolve_error(error)

    # -- for both kinds ------------------------------------------------------------------------

    def _resolve(self, reply: Reply) -> None:
        pending, self.pending = self.pending, None
        if pending is not None and not pending.done():
            pending.set_result(reply)

    def _resolve_error(self, error: BaseException) -> None:
        pending, self.pending = self.pending, None
        if pending is not None and not pending.done():
            pending.set_exception(error)

    def _settle(self, proposal: FailureVerdict) -> FailureVerdict:
        """Propose how the operation failed."""
        self.outcome = propose(self.client, self.keys, proposal)
        self.alarm.set()
        return self.outcome

    def _leave(self, *, clean: bool, own: list[str]) -> None:
        """Remove this rank's keys, and if it is the last one all others.

        A rank that leaves early leaves its keys: the coordinator may be about to read them.
        """
        self.left = True
        if clean:
            for key in own:
                self.client.delete(key)
        leave(self.client, self.keys, world_size=self.world_size, clean=clean)
