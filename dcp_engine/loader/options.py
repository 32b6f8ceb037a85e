"""What a caller may choose about one load."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dcp_engine.coordination.interface import Deadlines

__all__ = ["LOAD_PHASES", "SHARED_READS", "LoadOptions", "PerRankPolicy", "SharedReads"]

LOAD_PHASES = ("latest", "metadata", "manifest", "plan", "share", "read", "restore")
"""What ``phase_timeouts`` may name."""

PerRankPolicy = Literal["error", "skip", "list"]
SharedReads = Literal["once", "direct", "auto"]
SHARED_READS: tuple[SharedReads, ...] = ("once", "direct", "auto")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Choices of one load; the public ``load`` documents them."""

    deadlines: Deadlines = field(default_factory=Deadlines)
    coordinator_rank: int = 0
    per_rank: PerRankPolicy = "error"
    allow_pickle: bool = False
    shared_reads: SharedReads = "auto"
    as_rank: tuple[int, int] | None = None
    """Rank and world size for which per-rank values are chosen, where they are not those of the
    load: of a process that reads by itself and still is one of several."""
