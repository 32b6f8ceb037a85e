"""Basic indexing of a tensor that is not in memory: which box to read, and what to keep of it.

Integers, slices with positive steps and one ``...``, as torch indexes an ordinary tensor. Pure
functions; no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

from dcp_engine.errors import UsageError

__all__ = ["Index", "Selection", "select"]

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What an index selects, one entry per dimension of the tensor."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    """How many positions."""
    steps: tuple[int, ...]
    kept: tuple[bool, ...]
    """False where an integer removes the dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return tuple(n for n, keep in zip(self.counts, self.kept, strict=True) if keep)

    @property
    def extents(self) -> tuple[int, ...]:
        """From the first position to the last, in elements."""
        return tuple(
            (count - 1) * step + 1 if count else 0
            for count, step in zip(self.counts, self.steps, strict=True)
        )


def select(shape: Sequence[int], index: object, *, name: str) -> Selection:
    """Resolve ``index`` against a tensor of ``shape``.

    Raises:
        IndexError: out of range, or more indices than dimensions.
        UsageError: what only a tensor in memory can be indexed with.
    """
    items = index if isinstance(index, tuple) else (index,)
    gaps = sum(item is Ellipsis for item in items)
    if gaps > 1:
        raise IndexError(f"tensor {name!r}: an index can have one '...' only")
    given = len(items) - gaps
    if given > len(shape):
        raise IndexError(f"tensor {name!r} has {len(shape)} dimensions, and {given} were indexed")
    if not gaps:
        items = (*items, Ellipsis)
    rest = len(shape) - given
    starts: list[int] = []
    counts: list[int] = []
    steps: list[int] = []
    kept: list[bool] = []
    for item in items:
        for one in [slice(None)] * rest if item is Ellipsis else [item]:
            size = shape[len(starts)]
            start, count, step, keep = _resolve(one, size, len(starts), name)
            starts.append(start)
            counts.append(count)
            steps.append(step)
            kept.append(keep)
    return Selection(
        starts=tuple(starts), counts=tuple(counts), steps=tuple(steps), kept=tuple(kept)
    )


def _resolve(item: object, size: int, dim: int, name: str) -> tuple[int, int, int, bool]:
    if isinstance(item, slice):
        start, stop, step = item.indices(size)
        if step < 0:
            raise UsageError(
                f"a step of {step} in dimension {dim}; steps must be positive, as in torch",
                tensor=name,
                hint="slice forward and flip the result",
            )
        return start, len(range(start, stop, step)), step, True
    if isinstance(item, int) and not isinstance(item, bool):
        if not -size <= item < size:
            raise IndexError(
                f"index {item} is out of range for dimension {dim} of tensor {name!r}, "
                f"which has {size} positions"
            )
        return item % size, 1, 1, False
    raise UsageError(
        f"a stored tensor cannot be indexed with a {type(item).__name__}",
        tensor=name,
        hint="use integers, slices and '...', then index the tensor you get",
    )
