"""A save as columns: default planner, engine's own writer.

Steps: ``plan`` (local plans to the coordinator, assignments back), ``compare`` (only when the
combined digests of replicated values leave a doubt), ``write``, and ``commit`` on the coordinator.
"""

from __future__ import annotations

import logging
import uuid
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.default_planner import DefaultSavePlanner
from dcp_engine.error_context import located
from dcp_engine.errors import (
    ConflictError,
    InvalidPlanError,
)
from dcp_engine.format.metadata_view import ManifestMetadata
from dcp_engine.metadata import Metadata
from dcp_engine.native_storage import ColumnarWriter, CommitRecord, RankReport, SaveTicket
from dcp_engine.planning.columns import GlobalPlan, RankAssignment
from dcp_engine.planning.global_plan import assignments, make_global_plan
from dcp_engine.planning.replicas import (
    compare_details,
    needs_details,
    summarise,
)
from dcp_engine.planning.wire import (
    decode_assignment,
    decode_local_plans,
    encode_assignment,
    encode_local_plan,
)
from dcp_engine.saver.options import SaveOptions
from dcp_engine.saver.outcome import commit_once, settle_failure
from dcp_engine.saver.prepare import PreparedState, prepare
from dcp_engine.state.adapters import GroupRanks

__all__ = ["ReplicasDifferWarning", "save_columns"]

logger = logging.getLogger(__name__)


class ReplicasDifferWarning(UserWarning):
    """Ranks hold different values under one replicated key; one of them was stored."""


class _Offer(msgspec.Struct, array_like=True):
    """What a rank sends in step ``plan``."""

    plan: bytes
    summary: bytes
    observed: str | None


class _Answer(msgspec.Struct, array_like=True):
    """What the coordinator answers to all in step ``plan``."""

    save_id: str
    compare: bool


def save_columns(
    operation: Operation,
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | None,
    writer: ColumnarWriter,
    planner: DefaultSavePlanner,
    group: GroupRanks,
    options: SaveOptions,
    ticket: Callable[[str], SaveTicket],
) -> Metadata:
    """Carry one save through on this rank; see the module docstring for the order."""
    save = _ColumnarSave(operation, checkpoint_id, writer, planner, options)
    prepared, assignment, answer = save.plan(state_dict, group)
    if answer.compare:
        save.compare(prepared)
    record = save.write(lambda: ticket(answer.save_id), prepared, assignment)
    return ManifestMetadata.lazily(writer.manifest_source(record))


class _ColumnarSave:
    """The steps of one save on one rank. ``_global_plan`` and ``_observed`` are the coordinator's,
    made in its part of a step and used in its part of a later one."""

    def __init__(
        self,
        operation: Operation,
        checkpoint_id: str | None,
        writer: ColumnarWriter,
        planner: DefaultSavePlanner,
        options: SaveOptions,
    ) -> None:
        self._operation = operation
        self._checkpoint_id = checkpoint_id
        self._writer = writer
        self._planner = planner
        self._options = options
        self._global_plan: GlobalPlan | None = None
        self._observed: str | None = None

    def plan(
        self, state_dict: Mapping[str, Any], group: GroupRanks
    ) -> tuple[PreparedState, RankAssignment, _Answer]:
        prepared: list[PreparedState] = []

        def local() -> bytes:
            with self._located():
                self._writer.reset(self._checkpoint_id)
                observed = (
                    self._writer.observe(self._checkpoint_id)
                    if self._operation.is_coordinator
                    else None
                )
                state = prepare(
                    state_dict,
                    planner=self._planner,
                    group=group,
                    strict_replicas=self._strict,
                )
                prepared.append(state)
                return msgspec.msgpack.encode(
                    _Offer(
                        plan=encode_local_plan(state.source.plan),
                        summary=summarise(state.compared),
                        observed=observed,
                    )
                )

        common, own = self._operation.step("plan", local, self._decide_plan)
        assignment = decode_assignment(own, prepared[0].source.plan)
        return prepared[0], assignment, msgspec.msgpack.decode(common, type=_Answer)

    def _decide_plan(self, messages: list[bytes]) -> Decision:
        with self._located():
            offers = [msgspec.msgpack.decode(message, type=_Offer) for message in messages]
            plans = decode_local_plans([offer.plan for offer in offers])
            self._observed = offers[self._operation.coordinator_rank].observed
            self._global_plan = make_global_plan(
                plans,
                coordinator_rank=self._operation.coordinator_rank,
                dedup_to_lowest_rank=self._planner.dedup_save_to_lowest_rank,
            )
            answer = _Answer(
                save_id=uuid.uuid4().hex,
                compare=needs_details([offer.summary for offer in offers]),
            )
            return Decision(
                common=msgspec.msgpack.encode(answer),
                per_rank=[
                    encode_assignment(assignment, plan)
                    for assignment, plan in zip(
                        assignments(self._global_plan, plans), plans, strict=True
                    )
                ],
            )

    def compare(self, prepared: PreparedState) -> None:
        """Find out which replicated values differ, and on which ranks."""

        def decide(messages: list[bytes]) -> Decision:
            tables = [msgspec.msgpack.decode(m, type=dict[str, int]) for m in messages]
            comparison = compare_details(tables)
            if comparison.differing and self._strict:
                raise InvalidPlanError(
                    "ranks hold different values under one replicated key: "
                    + comparison.describe(),
                    kind="replicas_differ",
                    checkpoint=self._writer.checkpoint,
                    tensor=next(iter(comparison.differing)),
                    hint="make the ranks agree, or wrap rank-local values in PerRank",
                )
            return Decision(common=msgspec.msgpack.encode(comparison.describe()))

        common, _ = self._operation.step(
            "compare", lambda: msgspec.msgpack.encode(dict(prepared.compared)), decide
        )
        text = msgspec.msgpack.decode(common, type=str)
        if text:
            warnings.warn(
                f"saving {self._writer.checkpoint}: ranks hold different values under one "
                f"replicated key, and only one is stored: {text}. Make the ranks agree, or wrap "
                "rank-local values in PerRank",
                ReplicasDifferWarning,
                stacklevel=2,
            )

    def write(
        self,
        ticket: Callable[[], SaveTicket],
        prepared: PreparedState,
        assignment: RankAssignment,
    ) -> CommitRecord:
        operation, writer = self._operation, self._writer

        def local() -> bytes:
            with self._located():
                operation.check()
                writer.begin_save(self._checkpoint_id, ticket())
                report = writer.write_columns(
                    assignment,
                    prepared.source.names,
                    prepared.source.shapes,
                    prepared.source.tensors,
                    prepared.objects,
                    prepared.source.replicated_objects,
                    operation.check,
                )
                return msgspec.msgpack.encode(report)

        def decide(messages: list[bytes]) -> Decision:
            with self._located():
                reports = [msgspec.msgpack.decode(m, type=RankReport) for m in messages]
                plan = self._global_plan
                if plan is None:
                    raise ConflictError("the coordinator lost its global plan", kind="out_of_step")
                record = commit_once(
                    operation, lambda: writer.commit_columns(plan, reports, self._observed)
                )
                return Decision(common=msgspec.msgpack.encode(record))

        try:
            common, _ = operation.step("write", local, decide, decide_phase="commit")
        except BaseException as error:
            settle_failure(
                operation,
                error,
                abort=writer.abort_save,
                leave_in_doubt=writer.leave_in_doubt,
                checkpoint=writer.checkpoint,
            )
            raise
        if operation.is_coordinator:
            writer.remove_replaced()
        writer.end_save()
        return msgspec.msgpack.decode(common, type=CommitRecord)

    @property
    def _strict(self) -> bool:
        return self._options.strict_replicas or self._planner.strict_replicas

    def _located(self) -> Any:
        return located(checkpoint=self._writer.checkpoint, rank=self._operation.rank)
