"""One row of the I/O table: what was measured, and under which setting.

Belongs here: the data classes that cases give and tables take. Does not belong here: running
anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.measure import Measured

__all__ = ["BLOCK_BYTES", "FLOOR", "Case", "Setting", "Wanted"]

FLOOR = "raw floor"
BLOCK_BYTES = 64 << 10
"""Under one digest, unless a writer is told otherwise."""

Wanted = Callable[[str], bool]
"""Whether to run the case of this name: cases that nobody wants cost nothing."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case's numbers."""

    name: str
    nbytes: int
    tensors: int
    columns: dict[str, Measured] = field(default_factory=dict)
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    """By column, what was counted instead of timed."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases share."""

    size: int
    rounds: int
    disk: str
    """A directory on a disk."""
    memory: str
    """A directory on tmpfs."""
