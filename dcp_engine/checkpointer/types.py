"""The words of this layer: which rank this is, and what is saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from dcp_engine.errors import UsageError

__all__ = ["STATE_DICT", "RankInfo"]

STATE_DICT: TypeAlias = dict[str, Any]
"""Nested dicts, lists and tuples of tensors, sharded tensors and Python objects."""


@dataclass(frozen=True)
class RankInfo:
    """This process among those that write and read checkpoints together.

    Raises ``UsageError`` for a rank that is not below the world size.
    """

    global_rank: int
    """From 0."""
    global_world_size: int
    """How many there are."""

    def __post_init__(self) -> None:
        if not 0 <= self.global_rank < self.global_world_size:
            raise UsageError(
                f"rank {self.global_rank} of {self.global_world_size} does not exist",
                hint="global_rank counts from 0 and is below global_world_size",
            )
