"""``PerRank``: the mark on values that are every rank's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["PerRank"]

T = TypeVar("T")


@dataclass(frozen=True)
class PerRank(Generic[T]):
    """A value, or a subtree of the state dict, that every rank has its own of.

    Without the mark, ranks that hold different values under one key are reported, because one
    rank's copy would stand for all. With it, each rank's value is stored and restored to the same
    rank: ``{"rng": PerRank(torch.get_rng_state())}``. Loading fills tensors below it in place and
    replaces ``PerRank(old)`` by ``PerRank(new)`` otherwise.
    """

    value: T
