"""Indices with steps: what to read of what lies between the positions, and in which portions.

Belongs here: whether positions are read one by one or with what lies between them, and portions
that fit into bounded memory. Does not belong here: what an index means (``slicing``), reading.
Pure functions; no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from dcp_engine.loader.slicing import Selection
from dcp_engine.state.values import Box

__all__ = ["Portion", "positions_apart", "read_portions"]

T = TypeVar("T")

MAX_BOXES = 4096
"""Boxes that are read with one call: each takes some hundred bytes to describe."""


@dataclass(frozen=True, kw_only=True)
class Portion:
    """A part of a selection that is read at one go."""

    where: tuple[slice, ...]
    """The part of the result, one slice per dimension."""
    selection: Selection
    apart: tuple[bool, ...]
    """Dimensions whose positions are read one by one, without what lies between them."""

    @property
    def held(self) -> tuple[int, ...]:
        """Shape of what is read; that of the part of the result if nothing is read in vain."""
        selection = self.selection
        return tuple(
            count if apart else extent
            for count, extent, apart in zip(
                selection.counts, selection.extents, self.apart, strict=True
            )
        )

    @property
    def kept(self) -> tuple[slice, ...]:
        """What of that belongs to the result."""
        return tuple(
            slice(None, None, 1 if apart else step)
            for step, apart in zip(self.selection.steps, self.apart, strict=True)
        )

    def boxes(self) -> Iterator[tuple[Box, tuple[slice, ...]]]:
        """The boxes of the stored tensor to read, and where in what is read each goes."""
        starts, held = self.selection.starts, self.held
        alone = [range(n) if apart else range(1) for n, apart in zip(held, self.apart, strict=True)]
        sizes = tuple(1 if apart else n for n, apart in zip(held, self.apart, strict=True))
        for at in product(*alone):
            offsets = tuple(
                start + position * step
                for start, position, step in zip(starts, at, self.selection.steps, strict=True)
            )
            where = tuple(
                slice(position, position + size) for position, size in zip(at, sizes, strict=True)
            )
            yield Box(offsets=offsets, sizes=sizes), where


def positions_apart(
    selection: Selection, chunk_sizes: Sequence[int], *, itemsize: int, max_gap: int
) -> tuple[bool, ...]:
    """Per dimension, whether positions that do not follow each other are better read one by one.

    Args:
        chunk_sizes: shape of the chunks, as it is of most bytes.
        itemsize: bytes of an element.
        max_gap: what lies between two positions is read with them if it is fewer bytes. No less
            than a block, so that what is read apart has no block in common: of smaller gaps every
            block is read anyway.
    """
    apart = []
    stride = reach = itemsize  # of a position; from its first byte wanted to its last
    extents = selection.extents
    for d in reversed(range(len(extents))):
        step, size = selection.steps[d], chunk_sizes[d]
        far = step * stride - reach >= max_gap
        # With such a step there may be chunks between that nothing is wanted of.
        apart.append(step > 1 and selection.counts[d] > 1 and (far or step >= size))
        reach += (min(extents[d], size) - 1) * stride
        stride *= size
    return tuple(reversed(apart))


def read_portions(
    selection: Selection, apart: tuple[bool, ...], *, itemsize: int, max_bytes: int
) -> Iterator[Portion]:
    """Portions of ``selection``, which is not empty, that together are all of it.

    Args:
        apart: as ``positions_apart`` says.
        itemsize: bytes of an element.
        max_bytes: most bytes of a portion that reads more than belongs to the result.
    """
    where = tuple(slice(0, count) for count in selection.counts)
    whole = Portion(where=where, selection=selection, apart=apart)
    yield from _portions(whole, itemsize, max_bytes)


def _portions(portion: Portion, itemsize: int, max_bytes: int) -> Iterator[Portion]:
    counts, held = portion.selection.counts, portion.held
    boxes = math.prod(n for n, apart in zip(counts, portion.apart, strict=True) if apart)
    nbytes = math.prod(held) * itemsize if held != counts else 0
    if boxes > MAX_BOXES:
        dim = next(d for d, n in enumerate(counts) if n > 1 and portion.apart[d])
        positions = MAX_BOXES * counts[dim] // boxes
    elif nbytes > max_bytes:
        dim = next(d for d, n in enumerate(counts) if n > 1)
        step = 1 if portion.apart[dim] else portion.selection.steps[dim]
        positions = max_bytes // (step * (nbytes // held[dim]))
    else:
        yield portion
        return
    positions = max(1, positions)
    for begin in range(0, counts[dim], positions):
        part = _cut(portion, dim, begin, min(begin + positions, counts[dim]))
        yield from _portions(part, itemsize, max_bytes)


def _cut(portion: Portion, dim: int, begin: int, end: int) -> Portion:
    """Positions ``begin`` to ``end`` of one dimension."""
    selection, first = portion.selection, portion.where[dim].start
    start = selection.starts[dim] + begin * selection.steps[dim]
    return Portion(
        where=_with(portion.where, dim, slice(first + begin, first + end)),
        selection=Selection(
            starts=_with(selection.starts, dim, start),
            counts=_with(selection.counts, dim, end - begin),
            steps=selection.steps,
            kept=selection.kept,
        ),
        apart=portion.apart,
    )


def _with(values: tuple[T, ...], at: int, value: T) -> tuple[T, ...]:
    return (*values[:at], value, *values[at + 1 :])
