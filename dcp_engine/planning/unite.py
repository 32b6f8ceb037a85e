"""All ranks' boxes in one table, sorted, and which ranks hold the same box.

Belongs here: sorting and grouping on stacked arrays. Does not belong here: who writes what
(``balance``) and whether boxes tile (``validate``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcp_engine.errors import InvalidPlanError
from dcp_engine.planning.arrays import all_rows, pad_columns, stable_order
from dcp_engine.planning.columns import I32, I64, NO_ALIAS, LocalPlan
from dcp_engine.planning.divergence import format_ranks
from dcp_engine.planning.merge import Merged

__all__ = ["HeldBoxes", "describe_box", "unite_boxes"]

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
    count: I64
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
    shapes = merged.tensors.shapes
    width = shapes.shape[1]
    counts = [len(plan.chunks.tensor) for plan in locals_]
    tensor = _join([r.take(p.chunks.tensor) for r, p in zip(merged.rows, locals_, strict=True)])
    rank = np.repeat(np.arange(len(locals_), dtype=np.int32), counts)
    source = _join([np.arange(count, dtype=np.int32) for count in counts])
    offsets = np.concatenate([pad_columns(plan.chunks.offsets, width, 0) for plan in locals_])
    sizes = np.concatenate([pad_columns(plan.chunks.sizes, width, 1) for plan in locals_])
    _check_inside(merged, tensor, offsets, sizes, rank)

    order = stable_order(tensor)
    if (merged.aliases != NO_ALIAS).any():
        order = order[merged.aliases.take(tensor.take(order)) == NO_ALIAS]
    position = _row_major(shapes.take(tensor, axis=0), offsets)
    order = _by_position(order, tensor, position)
    tensor, rank, source = tensor.take(order), rank.take(order), source.take(order)
    position = position.take(order)
    offsets, sizes = offsets.take(order, axis=0), sizes.take(order, axis=0)

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
        count=np.diff(np.append(first, len(tensor))),
        rank=rank,
        source=source,
    )


def describe_box(offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> str:
    """``[0:4, 8:16]``; trailing padding is shown as ``0:1``."""
    ends = (offsets + sizes).tolist()
    return "[" + ", ".join(f"{b}:{e}" for b, e in zip(offsets.tolist(), ends, strict=True)) + "]"


def _join(arrays: Sequence[I32]) -> I32:
    return np.concatenate([*arrays, np.zeros(0, dtype=np.int32)])


def _row_major(shapes: I64, offsets: I64) -> I64:
    position = np.zeros(len(offsets), dtype=np.int64)
    for column in range(offsets.shape[1]):
        position *= shapes[:, column]
        position += offsets[:, column]
    return position


def _by_position(order: npt.NDArray[np.intp], tensor: I32, position: I64) -> npt.NDArray[np.intp]:
    """Refine ``order`` (by tensor, then rank) to tensor, position, rank."""
    sorted_tensor, sorted_position = tensor.take(order), position.take(order)
    rising = (sorted_tensor[1:] > sorted_tensor[:-1]) | (
        sorted_position[1:] >= sorted_position[:-1]
    )
    if rising.all():
        return order
    span = int(sorted_position.max()) + 1
    if span * (int(sorted_tensor[-1]) + 1) < _KEY_LIMIT:
        # One key; a merge sort, quick because each tensor is a few rising runs already.
        key = sorted_tensor * np.int64(span) + sorted_position
        return order.take(np.argsort(key, kind="stable"))
    return order.take(np.lexsort((sorted_position, sorted_tensor)))


def _check_inside(merged: Merged, tensor: I32, offsets: I64, sizes: I64, rank: I32) -> None:
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
