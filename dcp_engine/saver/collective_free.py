"""A save without a word between ranks: every rank commits a manifest of its own.

The checkpoint exists when the manifests of all ranks are there with one token; nothing can be
validated across ranks before a load does it, and nothing can be overwritten atomically.
"""

from __future__ import annotations

import msgspec

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.error_context import located
from dcp_engine.native_storage import ColumnarWriter, CommitRecord, SaveTicket
from dcp_engine.planning.collective_free import make_own_plan
from dcp_engine.saver.outcome import commit_once, finish_commit, settle_failure
from dcp_engine.saver.prepare import PrepareState

__all__ = ["save_collective_free"]


def save_collective_free(
    operation: Operation,
    prepare_state: PrepareState,
    *,
    checkpoint_id: str | None,
    writer: ColumnarWriter,
    ticket: SaveTicket,
) -> CommitRecord:
    """Write and commit this rank's part. ``operation`` is of this rank alone, and so is what
    ``prepare_state`` returns: its own share."""

    def write() -> bytes:
        with located(checkpoint=writer.checkpoint, rank=ticket.rank):
            writer.reset(checkpoint_id)
            prepared = prepare_state()
            plan, assignment = make_own_plan(
                prepared.source.plan, rank=ticket.rank, world_size=ticket.world_size
            )
            writer.begin_save(checkpoint_id, ticket)
            report = writer.write_columns(
                assignment,
                prepared.source.names,
                prepared.source.shapes,
                prepared.source.tensors,
                prepared.objects,
                prepared.source.replicated_objects,
                operation.check,
            )
            record = commit_once(operation, lambda: writer.commit_columns(plan, [report], None))
            return msgspec.msgpack.encode(record)

    def publish(messages: list[bytes]) -> Decision:
        return Decision(common=messages[0])

    try:
        common, _ = operation.step("write", write, publish)
    except BaseException as error:
        settle_failure(
            operation,
            error,
            abort=writer.abort_save,
            leave_in_doubt=writer.leave_in_doubt,
            reported=True,
            checkpoint=writer.checkpoint,
        )
        raise
    finish_commit([writer.end_save], checkpoint=writer.checkpoint)
    return msgspec.msgpack.decode(common, type=CommitRecord)
