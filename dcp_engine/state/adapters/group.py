"""The process group of an operation, as adapters need it: who is in it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GroupRanks"]


@dataclass(frozen=True, kw_only=True)
class GroupRanks:
    """The ranks that take part in a save or load.

    ``ranks`` lists their global ranks, in the order of the group; ``rank`` is this process's
    position in it. ``ranks=None`` says that this process acts alone (no process group, or
    ``no_dist``): whatever a mesh reaches, only the part that lies here is described, without a
    layout, and a ``DTensor`` whose other parts lie elsewhere is found incomplete by the planner's
    validation (``kind="plan_gap"``), not refused here.
    """

    ranks: tuple[int, ...] | None = None
    rank: int = 0
