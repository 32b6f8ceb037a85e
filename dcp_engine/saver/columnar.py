"""A save as columns: default planner, engine's own writer.

Steps: those of ``agreement``, then ``write`` on every rank and ``commit`` on the coordinator.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import msgspec

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.error_context import located
from dcp_engine.errors import ConflictError
from dcp_engine.format.names import new_save_id
from dcp_engine.native_storage import ColumnarWriter, CommitRecord, RankReport, SaveTicket
from dcp_engine.saver.agreement import Agreed, Agreement
from dcp_engine.saver.outcome import (
    commit_once,
    finish_commit,
    heeding_the_first_failure,
    settle_failure,
)
from dcp_engine.saver.plan_memory import PlanMemory
from dcp_engine.saver.prepare import PreparedState, PrepareState

__all__ = ["save_columns"]


def save_columns(
    operation: Operation,
    prepare_state: PrepareState,
    *,
    checkpoint_id: str | None,
    writer: ColumnarWriter,
    dedup_to_lowest_rank: bool,
    strict_replicas: bool,
    memory: PlanMemory,
    ticket: Callable[[str], SaveTicket],
) -> CommitRecord:
    """Carry one save through on this rank; see the module docstring for the order.

    Args:
        prepare_state: called in step ``agree``.
        dedup_to_lowest_rank, strict_replicas: see ``Agreement``.
    """
    save = _ColumnarSave(operation, checkpoint_id, writer, ticket)
    checkpoint = writer.checkpoint
    agreement = Agreement(
        operation,
        memory,
        dedup_to_lowest_rank=dedup_to_lowest_rank,
        strict_replicas=strict_replicas,
        checkpoint=checkpoint,
    )
    try:
        prepared, answer = save.agree(agreement, prepare_state)
        agreed = agreement.settle(answer, prepared)
        record = save.write(prepared, agreed)
    except BaseException as error:
        settle_failure(
            operation,
            error,
            abort=writer.abort_save,
            leave_in_doubt=writer.leave_in_doubt,
            reported=save.reported,
            checkpoint=checkpoint,
        )
        raise
    agreed.remember(memory)
    cleaning = [writer.remove_replaced] if operation.is_coordinator else []
    finish_commit([*cleaning, writer.end_save], checkpoint=checkpoint)
    return record


class _ColumnarSave:
    """The steps of one save on one rank that touch the medium. ``_observed`` is the coordinator's:
    the checkpoint that was there when the save began."""

    def __init__(
        self,
        operation: Operation,
        checkpoint_id: str | None,
        writer: ColumnarWriter,
        ticket: Callable[[str], SaveTicket],
    ) -> None:
        self.reported = False
        """Whether this rank has written its part."""
        self._operation = operation
        self._checkpoint_id = checkpoint_id
        self._writer = writer
        self._ticket = ticket
        self._observed: str | None = None

    def agree(
        self, agreement: Agreement, prepare_state: PrepareState
    ) -> tuple[PreparedState, bytes]:
        prepared: list[PreparedState] = []

        def local() -> bytes:
            with self._located():
                self._writer.reset(self._checkpoint_id)
                if self._operation.is_coordinator:
                    self._observed = self._writer.observe(self._checkpoint_id)
                prepared.append(prepare_state())
                return agreement.offer(prepared[0])

        def decide(messages: list[bytes]) -> Decision:
            with self._located():
                save_id = new_save_id()
                decision = agreement.decide(messages, save_id)
                # Before any other rank writes: what a killed job leaves must say whose it is.
                self._writer.begin_save(self._checkpoint_id, self._ticket(save_id))
                return decision

        answer, _ = self._operation.step("agree", local, decide)
        return prepared[0], answer

    def write(self, prepared: PreparedState, agreed: Agreed) -> CommitRecord:
        operation, writer = self._operation, self._writer

        def local() -> bytes:
            with heeding_the_first_failure(operation), self._located():
                operation.check()
                if not operation.is_coordinator:
                    writer.begin_save(self._checkpoint_id, self._ticket(agreed.save_id))
                report = writer.write_columns(
                    agreed.assignment,
                    prepared.source.names,
                    prepared.source.shapes,
                    prepared.source.tensors,
                    prepared.objects,
                    prepared.source.replicated_objects,
                    operation.check,
                )
                message = msgspec.msgpack.encode(report)
                self.reported = True
                return message

        def decide(messages: list[bytes]) -> Decision:
            with self._located():
                reports = [msgspec.msgpack.decode(m, type=RankReport) for m in messages]
                plan = agreed.global_plan
                if plan is None:
                    raise ConflictError("the coordinator lost its global plan", kind="out_of_step")
                record = commit_once(
                    operation, lambda: writer.commit_columns(plan, reports, self._observed)
                )
                return Decision(common=msgspec.msgpack.encode(record))

        common, _ = operation.step("write", local, decide, decide_phase="commit")
        return msgspec.msgpack.decode(common, type=CommitRecord)

    def _located(self) -> AbstractContextManager[None]:
        return located(checkpoint=self._writer.checkpoint, rank=self._operation.rank)
