"""Ranges of elements of a box, counted in row-major order.

A box of a chunk keeps its elements in the chunk's order, so what a range of the chunk holds of a
box is a range of the box. Belongs here: turning the one into the other, and a range into boxes.
Pure functions. Does not belong here: bytes (``geometry.runs``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dcp_engine.geometry.columns import I64

__all__ = ["elements_before", "range_boxes", "strides_of"]


def strides_of(sizes: Sequence[int]) -> list[int]:
    """Of a contiguous array of ``sizes``, in elements."""
    strides = [1] * len(sizes)
    for d in range(len(sizes) - 2, -1, -1):
        strides[d] = strides[d + 1] * sizes[d + 1]
    return strides


def elements_before(shape: I64, within: I64, lengths: I64, position: I64) -> I64:
    """How many elements of each box lie before an element of its array.

    Args:
        shape, within, lengths: ``(R, D)`` the array, and offsets and sizes of the box in it.
        position: ``(R,)`` row-major position in the array, up to the number of its elements.
    Returns:
        ``(R,)``
    """
    count = np.zeros(len(position), np.int64)
    inside = np.ones(len(position), np.bool_)
    rest = position.astype(np.int64)
    dims = shape.shape[1]
    if not dims:  # one element
        return np.minimum(rest, 1)
    inner_shape = np.ones((len(position), dims + 1), np.int64)
    inner_box = np.ones((len(position), dims + 1), np.int64)
    for d in range(dims - 1, -1, -1):
        inner_shape[:, d] = inner_shape[:, d + 1] * shape[:, d]
        inner_box[:, d] = inner_box[:, d + 1] * lengths[:, d]
    for d in range(dims):
        at, rest = np.divmod(rest, np.maximum(inner_shape[:, d + 1], 1))
        relative = at - within[:, d]
        whole = np.clip(relative, 0, lengths[:, d])
        count += np.where(inside, whole * inner_box[:, d + 1], 0)
        inside &= (relative >= 0) & (relative < lengths[:, d])
    return count


def range_boxes(
    sizes: Sequence[int], begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes (offsets, sizes) that tile elements ``begin`` to ``end`` of an array, in their order.

    There are at most ``2 * D - 1`` of them.
    """
    if begin >= end:
        return
    if not sizes:
        yield (), ()
        return
    inner = math.prod(sizes[1:])
    first, skipped = divmod(begin, inner)
    last, kept = divmod(end, inner)
    if skipped:
        stop = inner if last > first else kept
        for offsets, box in range_boxes(sizes[1:], skipped, stop):
            yield (first, *offsets), (1, *box)
        first += 1
    if last > first:
        yield (first, *([0] * (len(sizes) - 1))), (last - first, *sizes[1:])
    if kept and last >= first:
        for offsets, box in range_boxes(sizes[1:], 0, kept):
            yield (last, *offsets), (1, *box)
