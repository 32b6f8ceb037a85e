"""The process that stood for a rank in an operation is dead; the rank's own process says so.

Belongs here: the messages of a rank that cannot have any state of the operation. They are such
that the others act on them whatever the dead process had sent before. Does not belong here:
noticing the death.
"""

from __future__ import annotations

import time

from dcp_engine.coordination.failures import FailureRecord, exception_of
from dcp_engine.coordination.interface import DeathVerdict
from dcp_engine.coordination.keys import OperationKeys
from dcp_engine.coordination.messages import Event, FailureVerdict, decode, encode
from dcp_engine.coordination.role import announce_failure, leave
from dcp_engine.coordination.store_client import StoreClient
from dcp_engine.coordination.words import ALARM, EVENT, FAILURE, Tally
from dcp_engine.errors import CheckpointException

__all__ = ["remove_remains", "report_death"]

_LOOK = 0.03
"""Seconds."""


def report_death(
    client: StoreClient,
    keys: OperationKeys,
    record: FailureRecord,
    *,
    coordinator: int,
    world_size: int,
    checkpoint: str | None,
    patience: float,
) -> DeathVerdict:
    """Fail the operation for all ranks, and propose to abort.

    Args:
        checkpoint: its name, if it is of interest with what all ranks fail.
        patience: seconds for the coordinator to say so. It does not where it has not begun, or has
            gone on without this rank.
    Returns:
        With the outcome ``commit`` the save may have been committed.
    """
    if record.rank == coordinator:
        _fail_as_coordinator(client, keys, record, world_size)
        patience = 0.0
    else:
        announce_failure(client, keys, record)
    held = client.compare_set(keys.decision, b"abort")
    failure = None
    if checkpoint is not None:
        verdict = _awaited(client, keys, patience)
        failure = None if verdict is None else _exception(verdict, record, checkpoint)
    leave(client, keys, world_size=world_size, clean=False)
    return DeathVerdict(outcome="commit" if held == b"commit" else "abort", failure=failure)


def _awaited(client: StoreClient, keys: OperationKeys, patience: float) -> FailureVerdict | None:
    # Not a wait of the store's own, which warns on standard error where it is in vain.
    deadline = time.monotonic() + patience
    while not client.check([keys.outcome]):
        if time.monotonic() >= deadline:
            return None
        time.sleep(_LOOK)
    return decode(client.get(keys.outcome), FailureVerdict)


def _exception(verdict: FailureVerdict, own: FailureRecord, checkpoint: str) -> CheckpointException:
    """What all ranks raise; and this one's own death, if it came too late for that."""
    phase = f'in phase "{verdict.phase}"' if verdict.phase else "by the worker processes"
    known = any(record.rank == own.rank for record in verdict.records)
    return exception_of(
        verdict.records if known else [*verdict.records, own],
        doing=f"save {phase}",
        checkpoint=checkpoint,
        message=verdict.message,
        kind=verdict.kind,
    )


def remove_remains(client: StoreClient, keys: OperationKeys, *, rank: int, world_size: int) -> None:
    """Remove the keys of an operation that all ranks have ended, and of which ``rank`` may not
    have been counted as gone. Several ranks may do so at the same time."""
    for key in (keys.report(rank), keys.answer(rank)):
        _delete_whole(client, key)
    if not client.check([keys.tally]):
        return  # the last one to leave has removed everything
    for index in range(1, Tally.unpack(client.add(keys.tally, 0)).events + 1):
        _delete_whole(client, keys.event(index))
    for index in range(1, client.add(keys.failures, 0) + 1):
        client.delete(keys.failure(index))
    for other in range(world_size):
        client.delete(keys.pulse(other))
        for key in (keys.report(other), keys.answer(other)):
            _delete_whole(client, key)
    for key in keys.shared:
        client.delete(key)


def _delete_whole(client: StoreClient, key: str) -> None:
    """A value of any size, which need not be there."""
    pieces = 0
    while client.check([f"{key}/{pieces}"]):
        pieces += 1
    client.delete_pieces(key, pieces)
    client.delete(key)


def _fail_as_coordinator(
    client: StoreClient, keys: OperationKeys, record: FailureRecord, world_size: int
) -> None:
    """The verdict first, then everything that makes a participant look for it: those that report
    see the failure in the tally, those in a long write the alarm, those that wait the event."""
    client.compare_set(keys.outcome, encode(FailureVerdict(records=[record])))
    tally = Tally.unpack(client.add(keys.tally, FAILURE))
    others = [rank for rank in range(world_size) if rank != record.rank]
    client.multi_set({keys.pulse(rank): str(ALARM).encode() for rank in others})
    # Perhaps in the place of an event that the dead process published and did not count: who
    # has taken that one goes on to a report, and sees the tally.
    client.multi_put({keys.event(tally.events + 1): encode(Event(kind="failure"))})
    client.add(keys.tally, EVENT)
