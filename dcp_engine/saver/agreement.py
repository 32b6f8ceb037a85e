"""Agreeing on a plan: by digest if it was made before, else from all ranks' columns.

Steps: ``agree`` (every rank sends some 70 bytes: the fingerprint of its local plan, which plan it
remembers under it, and a digest of its replicated values), ``plan`` (only if a rank is new to the
plan: local plans to the coordinator, assignments back), ``compare`` (only if the digests of
replicated values leave a doubt; where ranks hold different keys, they send a digest for each
class of keys from then on). A remembered plan is used by a verdict of all ranks on one plan;
one rank that does not have it makes everybody plan anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import msgspec

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.error_context import located
from dcp_engine.planning.columns import GlobalPlan, RankAssignment
from dcp_engine.planning.fingerprint import Options, fingerprint
from dcp_engine.planning.global_plan import assignments, make_global_plan
from dcp_engine.planning.replica_classes import (
    Classes,
    same_in_all_classes,
    summarise_by_class,
)
from dcp_engine.planning.replicas import needs_details, summarise
from dcp_engine.planning.wire import (
    decode_assignment,
    decode_local_plans,
    encode_assignment,
    encode_local_plan,
)
from dcp_engine.saver.compare import compare_replicas
from dcp_engine.saver.plan_memory import NO_PLAN, PlanMemory, RankPlan, plan_id
from dcp_engine.saver.prepare import PreparedState

__all__ = ["Agreed", "Agreement"]


class _Offer(msgspec.Struct, array_like=True):
    """What a rank sends in step ``agree``."""

    fingerprint: bytes
    remembers: bytes
    summary: bytes
    """Of the replicated values: in one, or by class."""
    by_class: bool


class _Verdict(msgspec.Struct, array_like=True):
    """What the coordinator answers in step ``agree``."""

    save_id: str
    plan: bytes
    """The plan to use, by id; ``NO_PLAN`` asks for step ``plan``."""
    compare: bool


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What a rank knows when planning is over."""

    save_id: str
    assignment: RankAssignment
    global_plan: GlobalPlan | None
    """The coordinator's."""
    plan_id: bytes
    fingerprint: bytes
    classes: Classes | None
    """How to digest replicated values next time, if ranks hold different keys."""

    def remember(self, memory: PlanMemory) -> None:
        """Keep the plan for later saves; called when the save is committed."""
        plan = RankPlan(id=self.plan_id, assignment=self.assignment, classes=self.classes)
        memory.ranks.put(self.fingerprint, plan)
        if self.global_plan is not None:
            memory.plans.put(self.plan_id, self.global_plan.without_chunks())


class Agreement:
    """The planning steps of one save on one rank.

    Args:
        operation: the save.
        memory: plans of earlier saves.
        dedup_to_lowest_rank, strict_replicas: the planner's options.
        checkpoint: for messages.
    """

    def __init__(
        self,
        operation: Operation,
        memory: PlanMemory,
        *,
        dedup_to_lowest_rank: bool,
        strict_replicas: bool,
        checkpoint: str,
    ) -> None:
        self._operation = operation
        self._memory = memory
        self._dedup_to_lowest_rank = dedup_to_lowest_rank
        self._strict_replicas = strict_replicas
        self._checkpoint = checkpoint
        self._global_plan: GlobalPlan | None = None
        self._fingerprint = b""
        self._known: RankPlan | None = None
        self._id = NO_PLAN

    def offer(self, prepared: PreparedState) -> bytes:
        """This rank's message in step ``agree``."""
        self._fingerprint = fingerprint(prepared.source.plan, self._options())
        known = self._known = self._memory.ranks.get(self._fingerprint)
        by_class = None
        if known is not None and known.classes is not None:
            by_class = summarise_by_class(prepared.compared, known.classes)
        return msgspec.msgpack.encode(
            _Offer(
                fingerprint=self._fingerprint,
                remembers=NO_PLAN if known is None else known.id,
                summary=summarise(prepared.compared) if by_class is None else by_class,
                by_class=by_class is not None,
            )
        )

    def decide(self, messages: list[bytes], save_id: str) -> Decision:
        """The coordinator's part of step ``agree``."""
        offers = [msgspec.msgpack.decode(message, type=_Offer) for message in messages]
        self._id = plan_id([offer.fingerprint for offer in offers])
        remembered = all(offer.remembers == self._id for offer in offers)
        self._global_plan = self._memory.plans.get(self._id) if remembered else None
        return Decision(
            common=msgspec.msgpack.encode(
                _Verdict(
                    save_id=save_id,
                    plan=NO_PLAN if self._global_plan is None else self._id,
                    compare=_in_doubt(offers),
                )
            )
        )

    def settle(self, answer: bytes, prepared: PreparedState) -> Agreed:
        """Carry out what the coordinator answered in step ``agree``: on every rank alike."""
        verdict = msgspec.msgpack.decode(answer, type=_Verdict)
        if verdict.plan != NO_PLAN and self._known is not None:
            chosen, assignment = verdict.plan, self._known.assignment
        else:
            chosen, assignment = self._plan(prepared)
        classes = None if self._known is None else self._known.classes
        if verdict.compare:
            classes = compare_replicas(
                self._operation,
                prepared.compared,
                strict=self._strict_replicas,
                checkpoint=self._checkpoint,
            )
        return Agreed(
            save_id=verdict.save_id,
            assignment=assignment,
            global_plan=self._global_plan,
            plan_id=chosen,
            fingerprint=self._fingerprint,
            classes=classes,
        )

    def _options(self) -> Options:
        return {
            "world_size": self._operation.world_size,
            "coordinator_rank": self._operation.coordinator_rank,
            "dedup_to_lowest_rank": self._dedup_to_lowest_rank,
        }

    def _plan(self, prepared: PreparedState) -> tuple[bytes, RankAssignment]:
        local = prepared.source.plan

        def decide(messages: list[bytes]) -> Decision:
            with self._located():
                plans = decode_local_plans(messages)
                plan = self._global_plan = make_global_plan(
                    plans,
                    coordinator_rank=self._operation.coordinator_rank,
                    dedup_to_lowest_rank=self._dedup_to_lowest_rank,
                )
                return Decision(
                    common=self._id,
                    per_rank=[
                        encode_assignment(assignment, own)
                        for assignment, own in zip(assignments(plan, plans), plans, strict=True)
                    ],
                )

        chosen, own = self._operation.step("plan", lambda: encode_local_plan(local), decide)
        return chosen, decode_assignment(own, local)

    def _located(self) -> AbstractContextManager[None]:
        return located(checkpoint=self._checkpoint, rank=self._operation.rank)


def _in_doubt(offers: Sequence[_Offer]) -> bool:
    """Whether the ranks' tables of digests have to be compared."""
    summaries = [offer.summary for offer in offers]
    if all(offer.by_class for offer in offers):
        return not same_in_all_classes(summaries)
    return any(offer.by_class for offer in offers) or needs_details(summaries)
