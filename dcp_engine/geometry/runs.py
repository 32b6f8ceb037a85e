"""A box of a row-major array as runs of contiguous bytes.

All runs of one box have one length and lie in a regular pattern, so a box of any size is a few
integers; positions are made in slices, as they are needed. Does not belong here: merging runs for
reading (``geometry.coalesce``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dcp_engine.geometry.columns import I64

__all__ = ["Runs", "box_runs"]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Contiguous byte runs of one box, in row-major order.

    Run ``i`` begins at byte ``starts()[i]`` of the array and is ``length`` bytes long; the box,
    packed contiguously, holds it at ``i * length``.
    """

    first: int
    """Byte where the first run begins."""
    length: int
    """Bytes per run; 0 if the box is empty."""
    counts: tuple[int, ...]
    """How many steps there are per outer dimension, slowest first; () means one run."""
    strides: tuple[int, ...]
    """Bytes per step, one for each of ``counts``."""

    @property
    def count(self) -> int:
        """Number of runs."""
        return math.prod(self.counts) if self.length else 0

    @property
    def nbytes(self) -> int:
        """Bytes in all runs."""
        return self.count * self.length

    @property
    def span(self) -> tuple[int, int]:
        """First byte and the byte behind the last one."""
        if not self.count:
            return self.first, self.first
        last = self.first + sum((n - 1) * s for n, s in zip(self.counts, self.strides, strict=True))
        return self.first, last + self.length

    def starts(self, begin: int = 0, end: int | None = None) -> I64:
        """Where runs ``begin`` to ``end`` (all, unless given) begin, in bytes; ascending."""
        end = self.count if end is None else min(end, self.count)
        index = np.arange(begin, max(begin, end), dtype=np.int64)
        position = np.full(len(index), self.first, np.int64)
        for n, stride in zip(reversed(self.counts), reversed(self.strides), strict=True):
            index, step = np.divmod(index, n)
            position += step * stride
        return position


def box_runs(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], itemsize: int
) -> Runs:
    """The runs of box ``offsets``, ``sizes`` in a row-major array of ``shape``.

    Args:
        shape, offsets, sizes: D integers each, in elements; the box lies inside the array.
        itemsize: bytes per element.

    Trailing dimensions that the box spans in full melt into one run, and outer dimensions that
    follow on each other without a gap melt into one step.
    """
    strides = [itemsize] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    first = sum(o * s for o, s in zip(offsets, strides, strict=True))
    if 0 in sizes:
        return Runs(first=first, length=0, counts=(), strides=())
    length = itemsize
    d = len(shape) - 1
    while d >= 0:
        length *= sizes[d]
        if sizes[d] != shape[d]:
            d -= 1
            break
        d -= 1
    counts: list[int] = []
    steps: list[int] = []
    for e in range(d, -1, -1):
        if sizes[e] == 1:
            continue
        if counts and steps[-1] * counts[-1] == strides[e]:
            counts[-1] *= sizes[e]
        else:
            counts.append(sizes[e])
            steps.append(strides[e])
    return Runs(
        first=first, length=length, counts=tuple(reversed(counts)), strides=tuple(reversed(steps))
    )
