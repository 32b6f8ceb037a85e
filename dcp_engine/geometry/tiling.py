"""Do boxes tile a shape: no gap, no overlap, nothing outside?

One exact test for every way of sharding, in ``n log n``. Put +1 and -1 on the corners of every
box (the mixed derivative of its indicator function) and take the shape's own corners away. Boxes
tile the shape if and only if everything cancels, because a function of bounded support is
determined by its mixed derivative. One dimension is differentiated at a time, and what cancels is
dropped at once: in a grid that is nearly everything, so millions of boxes stay millions of rows.

What is left over also is a witness: at the lexicographically first point that does not cancel,
the weight is how often the point is covered too often (positive) or whether it is bare (negative).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dcp_engine.geometry.boxes import contains
from dcp_engine.geometry.columns import I64, Bool, group_rows, order_rows

__all__ = ["TilingFault", "find_tiling_fault", "find_tiling_faults"]


@dataclass(frozen=True, kw_only=True)
class TilingFault:
    """What is wrong with one tensor's boxes."""

    tensor: int
    kind: Literal["outside", "gap", "overlap"]
    point: tuple[int, ...]
    """An element that no box covers, or several do; for "outside", the offset of the box."""
    rows: tuple[int, ...]
    """Rows of the boxes concerned: the one outside, or (up to eight of) those that overlap."""


def find_tiling_fault(shape: I64, offsets: I64, sizes: I64) -> TilingFault | None:
    """``find_tiling_faults`` for one tensor of ``shape`` ``(D,)``."""
    tensor = np.zeros(len(offsets), np.int64)
    faults = find_tiling_faults(np.asarray(shape, np.int64)[None], tensor, offsets, sizes)
    return faults[0] if faults else None


def find_tiling_faults(
    shapes: I64, tensor: I64, offsets: I64, sizes: I64, *, limit: int = 100
) -> list[TilingFault]:
    """The first fault of every tensor that its boxes do not tile, by tensor.

    Args:
        shapes: ``(K, D)`` shapes, padded with 1. Tensors without elements need no boxes.
        tensor: ``(C,)`` rows of ``shapes``.
        offsets, sizes: ``(C, D)``. Boxes without elements are ignored where they lie inside.
        limit: how many faults are worked out at most; where there is one, there is one listed.
    """
    tensor = tensor.astype(np.int64, copy=False)
    inside = contains(np.zeros_like(shapes[tensor]), shapes[tensor], offsets, sizes)
    faults: dict[int, TilingFault] = {}
    outside = np.flatnonzero(~inside)
    for row in outside[np.unique(tensor[outside], return_index=True)[1]].tolist():
        at = int(tensor[row])
        faults[at] = TilingFault(
            tensor=at, kind="outside", point=tuple(offsets[row].tolist()), rows=(row,)
        )
    use = inside & (sizes > 0).all(axis=1)
    whole = np.asarray((shapes > 0).all(axis=1), np.bool_)
    whole[np.fromiter(faults, np.int64)] = False
    use &= whole[tensor]
    plain = _tiled_in_slabs(shapes, tensor[use], offsets[use], sizes[use])
    whole &= ~plain
    use &= whole[tensor]
    rows = np.flatnonzero(use)
    owners = np.flatnonzero(whole)
    residue_of, points, weights = _residue(
        shapes,
        np.concatenate([tensor[rows], owners]),
        np.concatenate([offsets[rows], np.zeros((len(owners), shapes.shape[1]), np.int64)]),
        np.concatenate([sizes[rows], shapes[owners]]),
        np.concatenate([np.ones(len(rows), np.int64), np.full(len(owners), -1, np.int64)]),
    )
    first = np.unique(residue_of, return_index=True)[1]
    for i in first[: max(limit - len(faults), 0)].tolist():
        point, k = points[i], int(residue_of[i])
        covering: tuple[int, ...] = ()
        if weights[i] > 0:
            mine = rows[tensor[rows] == k]
            one = np.ones_like(point)
            hit = contains(offsets[mine], sizes[mine], point, one)
            covering = tuple(mine[hit][:8].tolist())
        faults[k] = TilingFault(
            tensor=k,
            kind="overlap" if weights[i] > 0 else "gap",
            point=tuple(point.tolist()),
            rows=covering,
        )
    return [faults[k] for k in sorted(faults)][:limit]


def _tiled_in_slabs(shapes: I64, tensor: I64, offsets: I64, sizes: I64) -> Bool:
    """``(K,)``: tensors whose boxes are slabs along one dimension that follow on each other.

    This settles nearly all tensors of nearly all jobs, ten times faster than corners do; what it
    does not settle is not wrong yet.
    """
    settled = np.zeros(len(shapes), np.bool_)
    if not len(tensor):
        return settled
    partial = (offsets != 0) | (sizes != shapes[tensor])
    cut = np.zeros(shapes.shape, np.bool_)
    for d in range(shapes.shape[1]):
        cut[tensor[partial[:, d]], d] = True
    settled[tensor] = True
    settled &= cut.sum(axis=1) <= 1
    along = cut.argmax(axis=1) if shapes.shape[1] else np.zeros(len(shapes), np.int64)
    rows = np.flatnonzero(settled[tensor])
    if not len(rows):
        return settled
    tensor = tensor[rows]
    if shapes.shape[1]:
        begins, lengths = offsets[rows, along[tensor]], sizes[rows, along[tensor]]
        extents = shapes[np.arange(len(shapes)), along]
    else:
        begins, lengths = np.zeros(len(rows), np.int64), np.ones(len(rows), np.int64)
        extents = np.ones(len(shapes), np.int64)
    same = tensor[1:] == tensor[:-1]
    ordered = (tensor[1:] > tensor[:-1]) | (same & (begins[1:] >= begins[:-1]))
    if not bool(ordered.all()):
        order = order_rows([tensor, begins])
        tensor, begins, lengths = tensor[order], begins[order], lengths[order]
        same = tensor[1:] == tensor[:-1]
    ends = begins + lengths
    first = np.concatenate(([True], ~same))
    last = np.concatenate((~same, [True]))
    wrong = first & (begins != 0)
    wrong[1:] |= same & (begins[1:] != ends[:-1])
    wrong |= last & (ends != extents[tensor])
    settled[tensor[wrong]] = False
    return settled


def _residue(
    shapes: I64, tensor: I64, offsets: I64, sizes: I64, weights: I64
) -> tuple[I64, I64, I64]:
    """Tensor, point and weight of every corner that does not cancel, sorted by tensor, point.

    Dimensions where all boxes of a tensor run from end to end are not differentiated: there the
    function is constant, and its corner at 0 stands for all of it.
    """
    dims = shapes.shape[1]
    begins, ends = offsets.copy(), offsets + sizes
    tensor, begins, ends, weights = _cancel(tensor, begins, ends, weights)
    for d in range(dims):
        partial = (begins[:, d] != 0) | (ends[:, d] != shapes[tensor, d])
        cut = np.zeros(len(shapes), np.bool_)
        cut[tensor[partial]] = True
        divide = cut[tensor]
        ends[~divide, d] = begins[~divide, d] = 0
        lower, upper = begins[divide], begins[divide].copy()
        upper[:, d] = ends[divide, d]
        far_lower, far_upper = ends[divide], ends[divide].copy()
        far_lower[:, d] = lower[:, d]
        keep = ~divide
        tensor, begins, ends, weights = _cancel(
            np.concatenate([tensor[keep], tensor[divide], tensor[divide]]),
            np.concatenate([begins[keep], lower, upper]),
            np.concatenate([ends[keep], far_lower, far_upper]),
            np.concatenate([weights[keep], weights[divide], -weights[divide]]),
        )
    order = order_rows([tensor, *begins.T])
    return tensor[order], begins[order], weights[order]


def _cancel(tensor: I64, begins: I64, ends: I64, weights: I64) -> tuple[I64, I64, I64, I64]:
    """Add up the weights of equal rows; drop what comes to nothing."""
    if not len(tensor):
        return tensor, begins, ends, weights
    columns = [tensor]
    for d in range(begins.shape[1]):
        columns.append(begins[:, d])
        columns.append(ends[:, d])
    group, n = group_rows([c for i, c in enumerate(columns) if i == 0 or (c != c[0]).any()])
    total = np.zeros(n, np.int64)
    np.add.at(total, group, weights)
    sample = np.zeros(n, np.int64)
    sample[group] = np.arange(len(group))
    sample = sample[total != 0]
    return tensor[sample], begins[sample], ends[sample], total[total != 0]
