"""Boxes as columns: volumes, intersections, and which boxes of two sets meet.

Pure functions on ``(C, D)`` arrays (see ``geometry.columns``). Does not belong here: whether boxes
tile a shape (``geometry.tiling``) and bytes (``geometry.runs``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dcp_engine.geometry.columns import I64, Bool, order_rows

__all__ = [
    "MAX_VOLUME",
    "Intersections",
    "contains",
    "find_overlaps",
    "intersect",
    "split_rows",
    "volumes",
]

MAX_VOLUME = 1 << 62
"""``volumes`` stops here: hostile sizes must not wrap around to a harmless number."""

_PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Intersections:
    """Row-wise intersections; rows where ``some`` is false have sizes 0."""

    offsets: I64
    sizes: I64
    some: Bool
    """(C,) whether row ``i``'s boxes share an element."""


def volumes(sizes: I64) -> I64:
    """Elements per box: ``(C, D)`` sizes to ``(C,)``, saturating at ``MAX_VOLUME``.

    Negative sizes count as 0.
    """
    clipped = np.maximum(sizes, 0)
    product = np.prod(clipped, axis=1, dtype=np.int64)
    estimate = np.prod(clipped.astype(np.float64), axis=1)
    return np.where(estimate >= float(MAX_VOLUME), MAX_VOLUME, product).astype(np.int64)


def contains(outer_offsets: I64, outer_sizes: I64, offsets: I64, sizes: I64) -> Bool:
    """Row by row, does the outer box hold the other one? Arguments broadcast.

    An empty box (some size 0) is held where its corner is. Written without sums of what may be
    hostile, so that nothing wraps around.
    """
    inside = (
        (offsets >= outer_offsets)
        & (sizes >= 0)
        & (sizes <= outer_sizes)
        & (offsets - outer_offsets <= outer_sizes - sizes)
    )
    return np.asarray(inside.all(axis=-1), np.bool_)


def intersect(a_offsets: I64, a_sizes: I64, b_offsets: I64, b_sizes: I64) -> Intersections:
    """Row by row, what two boxes share. Arguments broadcast."""
    begin = np.maximum(a_offsets, b_offsets)
    end = np.minimum(a_offsets + a_sizes, b_offsets + b_sizes)
    sizes = end - begin
    some: Bool = (sizes > 0).all(axis=-1)
    return Intersections(offsets=begin, sizes=np.where(some[..., None], sizes, 0), some=some)


def find_overlaps(
    wanted_offsets: I64,
    wanted_sizes: I64,
    stored_offsets: I64,
    stored_sizes: I64,
    *,
    wanted_tensor: I64 | None = None,
    stored_tensor: I64 | None = None,
) -> tuple[I64, I64]:
    """Which stored boxes each wanted box meets.

    Args:
        wanted_offsets, wanted_sizes: ``(W, D)``.
        stored_offsets, stored_sizes: ``(S, D)``.
        wanted_tensor, stored_tensor: ``(W,)`` and ``(S,)``: only boxes of one tensor meet; both
            or neither.
    Returns:
        ``(wanted, stored)``: row numbers of the pairs that share an element, sorted by wanted
        row, then stored row.

    Every wanted box is looked up by binary search in the dimension where it has the fewest
    candidates. With S stored boxes in G slabs per dimension that is S log S for sorting and
    S / G candidates for each slab wanted, whichever dimensions are sharded.
    """
    wanted_rows, stored_rows = len(wanted_offsets), len(stored_offsets)
    nothing = np.empty(0, np.int64)
    if not wanted_rows or not stored_rows:
        return nothing, nothing
    of_wanted = wanted_tensor if wanted_tensor is not None else np.zeros(wanted_rows, np.int64)
    of_stored = stored_tensor if stored_tensor is not None else np.zeros(stored_rows, np.int64)
    dims = wanted_offsets.shape[1]
    if dims == 0:  # 0-d tensors only: every box is its tensor
        wanted_offsets = np.zeros((wanted_rows, 1), np.int64)
        stored_offsets = np.zeros((stored_rows, 1), np.int64)
        wanted_sizes, stored_sizes = np.ones_like(wanted_offsets), np.ones_like(stored_offsets)
        dims = 1
    sweeps = [_Sweep.make(of_stored, stored_offsets[:, d], stored_sizes[:, d]) for d in range(dims)]
    ranges = [
        sweep.candidates(of_wanted, wanted_offsets[:, d], wanted_sizes[:, d])
        for d, sweep in enumerate(sweeps)
    ]
    counts = np.stack([high - low for low, high in ranges])
    best = counts.argmin(axis=0)
    pairs: list[tuple[I64, I64]] = []
    for d, (low, high) in enumerate(ranges):
        rows = np.flatnonzero((best == d) & (high > low))
        for part in _in_parts(rows, (high - low)[rows]):
            wanted = np.repeat(part, (high - low)[part])
            stored = sweeps[d].order[_expand(low[part], high[part])]
            meet = _meet(wanted_offsets, wanted_sizes, wanted, stored_offsets, stored_sizes, stored)
            pairs.append((wanted[meet], stored[meet]))
    if not pairs:
        return nothing, nothing
    wanted = np.concatenate([w for w, _ in pairs])
    stored = np.concatenate([s for _, s in pairs])
    order = order_rows([wanted, stored])
    return wanted[order], stored[order]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sweep:
    """Intervals of many tensors in one dimension, sorted, ready for binary search.

    A search key is ``code of the tensor * stride + coordinate``, so that one sorted array serves
    for all tensors. Where that would not fit into 64 bits, coordinates are replaced by their rank
    in ``ladder``.
    """

    order: I64
    tensors: I64
    """Distinct tensors, sorted; positions in it are the tensors' codes."""
    stride: int
    ladder: I64 | None
    starts: I64
    reach: I64
    """The farthest end of this and all earlier intervals of the tensor, as a key."""

    @staticmethod
    def make(tensor: I64, offsets: I64, sizes: I64) -> _Sweep:
        tensors, code = np.unique(tensor, return_inverse=True)
        begins, ends, ladder = offsets, offsets + sizes, None
        stride = int(np.max(ends, initial=0)) + 2
        if stride * len(tensors) >= MAX_VOLUME:
            ladder = np.unique(np.concatenate([begins, ends]))
            begins, ends = np.searchsorted(ladder, begins), np.searchsorted(ladder, ends)
            stride = len(ladder) + 2
        base = code.astype(np.int64).reshape(-1) * stride + 1
        order = np.argsort(base + begins, kind="stable").astype(np.int64, copy=False)
        return _Sweep(
            order=order,
            tensors=tensors,
            stride=stride,
            ladder=ladder,
            starts=(base + begins)[order],
            # Keys of later tensors are larger throughout, so one running maximum does.
            reach=np.maximum.accumulate((base + ends)[order]),
        )

    def candidates(self, tensor: I64, offsets: I64, sizes: I64) -> tuple[I64, I64]:
        """Positions ``[low, high)`` of ``order`` that may meet each wanted interval."""
        at = np.minimum(np.searchsorted(self.tensors, tensor), len(self.tensors) - 1)
        known = self.tensors[at] == tensor
        base = at.astype(np.int64) * self.stride + 1
        begins, ends = offsets, offsets + sizes
        if self.ladder is not None:
            begins = np.searchsorted(self.ladder, begins, side="right") - 1
            ends = np.searchsorted(self.ladder, ends, side="left")
        begins, ends = (np.clip(x, -1, self.stride - 2) for x in (begins, ends))
        # An interval whose reach is <= begin ends before it; one with start >= end begins after.
        low = np.searchsorted(self.reach, base + begins, side="right")
        high = np.searchsorted(self.starts, base + ends, side="left")
        high = np.where(known, np.maximum(high, low), low)
        return low.astype(np.int64), high.astype(np.int64)


def _in_parts(rows: I64, counts: I64) -> list[I64]:
    """Cut ``rows`` so that a part has a bounded number of candidates (or is a single row)."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(np.cumsum(counts) // _PAIRS_AT_ONCE)) + 1
    return np.split(rows, cuts)


def _expand(low: I64, high: I64) -> I64:
    """``low[0], ..., high[0]-1, low[1], ..., high[1]-1, ...``"""
    counts = high - low
    begins = np.cumsum(counts) - counts
    steps: I64 = np.repeat(low - begins, counts)
    return steps + np.arange(int(counts.sum()), dtype=np.int64)


def _meet(a_offsets: I64, a_sizes: I64, a: I64, b_offsets: I64, b_sizes: I64, b: I64) -> Bool:
    meet = np.ones(len(a), np.bool_)
    for d in range(a_offsets.shape[1]):
        begin = np.maximum(a_offsets[a, d], b_offsets[b, d])
        end = np.minimum(a_offsets[a, d] + a_sizes[a, d], b_offsets[b, d] + b_sizes[b, d])
        meet &= end > begin
    return meet


def split_rows(offsets: I64, sizes: I64, shares: Sequence[float]) -> tuple[I64, I64]:
    """Cut one box into ``len(shares)`` slabs, part ``i`` in proportion to ``shares[i]``.

    The cut runs along the first dimension that is not of size 1, so that each part is one
    contiguous range of the box; where that dimension has fewer rows than there are parts, some
    parts are empty (a size 0).

    Args:
        offsets, sizes: ``(D,)``, one box.
        shares: weights >= 0, at least one > 0.
    Returns:
        ``(k, D)`` offsets and sizes, in order, tiling the box.
    """
    k, dims = len(shares), len(sizes)
    out_offsets = np.tile(np.asarray(offsets, np.int64), (k, 1))
    out_sizes = np.tile(np.asarray(sizes, np.int64), (k, 1))
    long = np.flatnonzero(np.asarray(sizes) != 1)
    weights = np.asarray(shares, np.float64)
    if dims == 0:  # a scalar has no dimension that could be empty; it cannot be cut
        return out_offsets, out_sizes
    dim = int(long[0]) if len(long) else 0
    rows = int(sizes[dim])
    cuts = np.rint(np.cumsum(weights) / weights.sum() * rows).astype(np.int64)
    cuts[-1] = rows
    begins = np.concatenate(([0], cuts[:-1]))
    out_offsets[:, dim] += begins
    out_sizes[:, dim] = cuts - begins
    return out_offsets, out_sizes
