"""Plans of earlier saves, kept by the engine between saves.

Belongs here: what a rank and the coordinator keep of a plan, under which keys. Does not belong
here: when a plan may be used (``agreement``: only by a verdict of all ranks), and the bounded
cache itself (``planning.cache``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from dcp_engine.planning.cache import PlanCache
from dcp_engine.planning.columns import GlobalPlan, RankAssignment
from dcp_engine.planning.replica_classes import Classes

__all__ = ["NO_PLAN", "PlanMemory", "RankPlan", "plan_id"]

NO_PLAN = b""
"""The id of no plan."""


def plan_id(fingerprints: Sequence[bytes]) -> bytes:
    """16 bytes that name the global plan made from local plans with these fingerprints."""
    return xxhash.xxh3_128_digest(b"".join(fingerprints))


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank's part of a plan that was carried out."""

    id: bytes
    assignment: RankAssignment
    classes: Classes | None = None
    """Of this rank's replicated keys, where ranks hold different ones."""


class PlanMemory:
    """What this process remembers of plans. Only saves that were committed are put in.

    ``ranks`` maps this rank's fingerprint to its part of the plan used last under it; ``plans``,
    filled on coordinators, maps a plan's id to the plan.
    """

    def __init__(self, capacity: int = 4) -> None:
        self.ranks: PlanCache[bytes, RankPlan] = PlanCache(capacity)
        self.plans: PlanCache[bytes, GlobalPlan] = PlanCache(capacity)

    def clear(self) -> None:
        """Forget everything."""
        self.ranks.clear()
        self.plans.clear()
