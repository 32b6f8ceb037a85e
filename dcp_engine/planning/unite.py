"""All ranks' boxes in one table, sorted, and which ranks hold the same box.

Belongs here: sorting and grouping on stacked arrays. Does not belong here: who writes what
(``balance``) and whether boxes tile (``validate``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dcp_engine.errors import InvalidPlanError
from dcp_engine.planning.arrays import (
    all_rows,
    pad_columns,
    run_blocks,
    segment_positions,
    segment_starts,
    stable_order,
)
from dcp_engine.planning.columns import I32, I64, NO_ALIAS, LocalPlan
from dcp_engine.planning.divergence import format_ranks
from dcp_engine.planning.merge import Merged

__all__ = ["HeldBoxes", "describe_box", "unite_boxes"]

S = TypeVar("S", bound=np.generic)

_KEY_LIMIT = 1 << 62


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldBoxes:
    """U distinct boxes and the H places where they are held.

    Boxes are sorted by tensor, then by offsets (row-major). The holders of box ``u`` are rows
    ``first[u] : first[u] + count[u]`` of ``rank`` and ``source``, by rank.
    """

    tensor: I32
    """(U,) row of the merged table."""
    offsets: I64
    """(U, D)"""
    sizes: I64
    """(U, D)"""
    first: I64
    """(U,)"""
    count: I32
    """(U,)"""
    rank: I32
    """(H,)"""
    source: I32
    """(H,) row of the rank's own ``LocalPlan.chunks``."""


def unite_boxes(locals_: Sequence[LocalPlan], merged: Merged) -> HeldBoxes:
    """Collect the boxes of all ranks, without those of aliases.

    Raises ``InvalidPlanError(kind="plan_overlap")`` for a box outside its tensor, and for two
    that begin at one place and are not the same.
    """
    listed = _by_tensor(locals_, merged)
    first = np.empty(len(listed.tensor), np.int64)
    count = np.empty(len(listed.tensor), np.int32)
    boxes = holders = 0
    for block in run_blocks(listed.tensor):
        part = _unite(merged, listed.at(block))
        here = slice(boxes, boxes + len(part.tensor))
        there = slice(holders, holders + len(part.rank))
        boxes, holders = here.stop, there.stop
        # In place: what is written lies before what is still to be read.
        listed.tensor[here] = part.tensor
        listed.offsets[here], listed.sizes[here] = part.offsets, part.sizes
        listed.rank[there], listed.source[there] = part.rank, part.source
        first[here], count[here] = part.first + there.start, part.count
    return HeldBoxes(
        tensor=_cut_off(listed.tensor, boxes),
        offsets=_cut_off(listed.offsets, boxes),
        sizes=_cut_off(listed.sizes, boxes),
        first=_cut_off(first, boxes),
        count=_cut_off(count, boxes),
        rank=_cut_off(listed.rank, holders),
        source=_cut_off(listed.source, holders),
    )


def _cut_off(column: npt.NDArray[S], length: int) -> npt.NDArray[S]:
    """The first rows; in memory of their own where most of the column's would be of no use."""
    return column[:length] if 2 * length > len(column) else column[:length].copy()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Listed:
    """N boxes, each as often as ranks hold it."""

    tensor: I32
    offsets: I64
    sizes: I64
    rank: I32
    source: I32

    def at(self, rows: slice | npt.NDArray[np.intp]) -> _Listed:
        return _Listed(
            tensor=self.tensor[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            rank=self.rank[rows],
            source=self.source[rows],
        )


def _by_tensor(locals_: Sequence[LocalPlan], merged: Merged) -> _Listed:
    """The boxes of all ranks, by tensor, then rank, then as the rank lists them: each is put where
    it belongs, without a table in another order to begin with."""
    table = merged.tensors
    counts = np.zeros(len(table.names), np.int64)
    for rows, plan in zip(merged.rows, locals_, strict=True):
        np.add.at(counts, rows.take(plan.chunks.tensor), 1)
    ends = np.cumsum(counts)
    total, width = int(counts.sum()), table.shapes.shape[1]
    listed = _Listed(
        tensor=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        offsets=np.empty((total, width), np.int64),
        sizes=np.empty((total, width), np.int64),
        rank=np.empty(total, np.int32),
        source=np.empty(total, np.int32),
    )
    free = ends - counts
    for rank, (rows, plan) in enumerate(zip(merged.rows, locals_, strict=True)):
        tensor = rows.take(plan.chunks.tensor)
        place = free.take(tensor)
        if not (tensor[1:] > tensor[:-1]).all():
            place += _times_before(tensor)
        free[tensor] = place + 1
        listed.offsets[place] = pad_columns(plan.chunks.offsets, width, 0)
        listed.sizes[place] = pad_columns(plan.chunks.sizes, width, 1)
        listed.rank[place] = rank
        listed.source[place] = np.arange(len(place))
    return listed


def _times_before(values: I32) -> I64:
    """(N,) how often each value has come before."""
    order = stable_order(values)
    begins = segment_starts(values.take(order))
    times = np.empty(len(values), np.int64)
    times[order] = segment_positions(np.diff(np.append(begins, len(values))))
    return times


def _unite(merged: Merged, listed: _Listed) -> HeldBoxes:
    """Unite the boxes of some tensors, sorted by tensor, then rank."""
    _check_inside(merged, listed)
    if (merged.aliases != NO_ALIAS).any():
        listed = listed.at(np.flatnonzero(merged.aliases.take(listed.tensor) == NO_ALIAS))
    position = _row_major(merged.tensors.shapes.take(listed.tensor, axis=0), listed.offsets)
    order = _by_position(listed.tensor, position)
    if order is not None:
        listed, position = listed.at(order), position.take(order)
    tensor, offsets, sizes = listed.tensor, listed.offsets, listed.sizes
    rank, source = listed.rank, listed.source

    again = (tensor[1:] == tensor[:-1]) & (position[1:] == position[:-1])
    clash = again & ~all_rows(sizes[1:] == sizes[:-1])
    if clash.any():
        at = int(np.argmax(clash))
        raise InvalidPlanError(
            f"boxes {describe_box(offsets[at], sizes[at])} on rank {rank[at]} and "
            f"{describe_box(offsets[at + 1], sizes[at + 1])} on rank {rank[at + 1]} overlap",
            kind="plan_overlap",
            tensor=merged.tensors.names[int(tensor[at])],
            hint="the ranks' shards must be parts of one layout",
        )
    # A rank may list a box twice; it holds it once.
    twice = np.flatnonzero(again & (rank[1:] == rank[:-1])) + 1
    if len(twice):
        keep = np.ones(len(tensor), dtype=np.bool_)
        keep[twice] = False
        tensor, rank, source = tensor[keep], rank[keep], source[keep]
        offsets, sizes, again = offsets[keep], sizes[keep], again[keep[1:]]
    first = np.flatnonzero(np.concatenate(([len(tensor) > 0], ~again))[: len(tensor)])
    return HeldBoxes(
        tensor=tensor.take(first),
        offsets=offsets.take(first, axis=0),
        sizes=sizes.take(first, axis=0),
        first=first,
        count=np.diff(np.append(first, len(tensor))).astype(np.int32),
        rank=rank,
        source=source,
    )


def describe_box(offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> str:
    """``[0:4, 8:16]``; trailing padding is shown as ``0:1``."""
    ends = (offsets + sizes).tolist()
    return "[" + ", ".join(f"{b}:{e}" for b, e in zip(offsets.tolist(), ends, strict=True)) + "]"


def _row_major(shapes: I64, offsets: I64) -> I64:
    position = np.zeros(len(offsets), dtype=np.int64)
    for column in range(offsets.shape[1]):
        position *= shapes[:, column]
        position += offsets[:, column]
    return position


def _by_position(tensor: I32, position: I64) -> npt.NDArray[np.intp] | None:
    """The order that refines tensor, rank to tensor, position, rank; None if it is that already."""
    falls = (position[1:] < position[:-1]) & (tensor[1:] == tensor[:-1])
    if not falls.any():
        return None
    span = int(position.max()) + 1
    if span * (int(tensor[-1] - tensor[0]) + 1) < _KEY_LIMIT:
        # One key; a merge sort, quick because each tensor is a few rising runs already.
        key = (tensor - tensor[0]) * np.int64(span) + position
        return np.argsort(key, kind="stable")
    return np.lexsort((position, tensor))


def _check_inside(merged: Merged, listed: _Listed) -> None:
    tensor, offsets, sizes, rank = listed.tensor, listed.offsets, listed.sizes, listed.rank
    shapes = merged.tensors.shapes.take(tensor, axis=0)
    inside = all_rows((offsets >= 0) & (sizes >= 1) & (sizes <= shapes - offsets))
    if inside.all():
        return
    at = int(np.argmin(inside))
    row = int(tensor[at])
    ndim = int(merged.tensors.ndims[row])
    held = rank[(tensor == row) & ~inside].tolist()
    raise InvalidPlanError(
        f"box {describe_box(offsets[at, :ndim], sizes[at, :ndim])} on {format_ranks(held)} lies "
        f"outside the shape {merged.tensors.shapes[row, :ndim].tolist()}",
        kind="plan_overlap",
        tensor=merged.tensors.names[row],
        rank=int(rank[at]),
        hint="the local shard must be the one that its mesh and placements imply",
    )
