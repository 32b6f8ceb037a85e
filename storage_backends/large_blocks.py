"""Blocks that are too large to be held in scratch memory, cut into parts.

A block counts only as a whole, because its digest does. One of up to ``MAX_WHOLE`` is read at one
go, edges of it that nobody wants with the rest; a larger one part by part, each taken into the
digest and then put where it belongs. Belongs here: which parts, and what of them goes where. Pure
arithmetic. Does not belong here: reading (``read_batch``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dcp_engine.geometry.row_major import elements_before, range_boxes, strides_of

__all__ = ["MAX_WHOLE", "BlockPart", "parts_of_box", "parts_of_run"]

MAX_WHOLE = 1 << 20
"""The largest block that is read at one go: with one to either side of it, scratch memory for 8 MiB
stays near that."""


class BlockPart(NamedTuple):
    """Bytes ``begin`` to ``end`` of a chunk, inside one block."""

    begin: int
    end: int
    target: memoryview | None
    """Where they belong; None: through scratch memory."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...], int]]
    """What is copied from there: offsets and sizes in the wanted box, in elements, and the byte of
    the part where the first element is."""


def parts_of_run(
    begin: int, end: int, view: memoryview, *, nbytes: int, block_size: int, step: int, span: int
) -> Iterator[list[BlockPart]]:
    """The blocks of a chunk of ``nbytes`` that hold bytes ``begin`` to ``end``, which belong into
    ``view``: in parts of at most ``step``, or ``span`` where they go through scratch memory."""
    for low in range(begin - begin % block_size, end, block_size):
        high = min(low + block_size, nbytes)
        first, last = max(begin, low), min(end, high)
        yield [
            *(BlockPart(at, to, None, []) for at, to in _cut(low, first, span)),
            *(
                BlockPart(at, to, view[at - begin : to - begin], [])
                for at, to in _cut(first, last, step)
            ),
            *(BlockPart(at, to, None, []) for at, to in _cut(last, high, span)),
        ]


def parts_of_box(
    sizes: Sequence[int],
    within: Sequence[int],
    lengths: Sequence[int],
    *,
    itemsize: int,
    nbytes: int,
    block_size: int,
    span: int,
) -> Iterator[list[BlockPart]]:
    """The blocks of a chunk of ``nbytes`` that hold an element of box ``within, lengths``, in parts
    of at most ``span`` bytes, a multiple of ``itemsize``."""
    if 0 in lengths:
        return
    strides = strides_of(sizes)
    first = sum(map(int.__mul__, within, strides)) * itemsize
    reach = zip(within, lengths, strides, strict=True)
    end = sum((w + n - 1) * s for w, n, s in reach) * itemsize + itemsize
    for low in range(first - first % block_size, end, block_size):
        cuts = list(_cut(low, min(low + block_size, nbytes), span))
        borders = np.array([low, *(to for _, to in cuts)], np.int64) // itemsize
        shapes = (np.array([x] * len(borders), np.int64) for x in (sizes, within, lengths))
        shape, offset, extent = shapes
        before = elements_before(shape, offset, extent, borders).tolist()
        if before[0] == before[-1]:
            continue
        parts = []
        for (at, to), one, two in zip(cuts, before, before[1:], strict=False):
            boxes = [
                (offsets, extents, _position(within, offsets, strides) * itemsize - at)
                for offsets, extents in range_boxes(lengths, one, two)
            ]
            parts.append(BlockPart(at, to, None, boxes))
        yield parts


def _cut(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + step, end)) for at in range(begin, end, step))


def _position(within: Sequence[int], offsets: Sequence[int], strides: Sequence[int]) -> int:
    """The element of the chunk."""
    return sum((w + o) * s for w, o, s in zip(within, offsets, strides, strict=True))
