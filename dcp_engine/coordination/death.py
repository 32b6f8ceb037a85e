"""The process that stood for a rank in an operation is dead; the rank's own process says so.

Belongs here: the messages of a rank that cannot have any state of the operation. They are such
that the others act on them whatever the dead process had sent before. Does not belong here:
noticing the death.
"""

from __future__ import annotations

from dcp_engine.coordination.failures import FailureRecord
from dcp_engine.coordination.interface import Outcome
from dcp_engine.coordination.keys import OperationKeys
from dcp_engine.coordination.messages import Event, FailureVerdict, encode
from dcp_engine.coordination.role import announce_failure, leave
from dcp_engine.coordination.store_client import StoreClient
from dcp_engine.coordination.words import ALARM, EVENT, FAILURE, Tally

__all__ = ["report_death"]


def report_death(
    client: StoreClient,
    keys: OperationKeys,
    record: FailureRecord,
    *,
    coordinator: int,
    world_size: int,
) -> Outcome:
    """Fail the operation for all ranks, and propose to abort.

    Returns how the save ends by the decision key: with ``commit`` it may have been committed.
    """
    if record.rank == coordinator:
        _fail_as_coordinator(client, keys, record, world_size)
    else:
        announce_failure(client, keys, record)
    held = client.compare_set(keys.decision, b"abort")
    leave(client, keys, world_size=world_size, clean=False)
    return "commit" if held == b"commit" else "abort"


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
