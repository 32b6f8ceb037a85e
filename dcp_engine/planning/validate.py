"""Do the ranks' boxes tile every tensor: no gap, no overlap, nothing outside.

Whatever a device mesh shards takes one comparison of neighbours per dimension; other layouts go
through ``geometry.tiling``. Both are near linear in the number of boxes whichever dimensions are
cut. Belongs here: that check and its errors. Does not belong here: agreement about
names and shapes (``merge``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dcp_engine.errors import InvalidPlanError
from dcp_engine.geometry.tiling import TilingFault, find_tiling_faults
from dcp_engine.planning.arrays import run_blocks
from dcp_engine.planning.columns import I32, I64, NO_ALIAS, TensorTable
from dcp_engine.planning.divergence import format_ranks
from dcp_engine.planning.unite import HeldBoxes, describe_box

__all__ = ["validate_tiling"]

Bool = npt.NDArray[np.bool_]

_SHOWN_BOXES = 3


def validate_tiling(tensors: TensorTable, aliases: I32, boxes: HeldBoxes) -> None:
    """Check that ``boxes`` (sorted, in bounds, distinct) tile every tensor that is stored.

    Raises ``InvalidPlanError`` of kind ``plan_gap`` or ``plan_overlap``, naming tensor, box and
    ranks.
    """
    needed = (tensors.shapes > 0).all(axis=1) & (aliases == NO_ALIAS)
    doubtful = needed & ~_tiled_slab_by_slab(tensors.shapes, boxes)
    if not doubtful.any():
        return
    mine = np.flatnonzero(doubtful.take(boxes.tensor))
    rows = np.flatnonzero(doubtful)
    number = np.zeros(len(doubtful), dtype=np.int64)
    number[rows] = np.arange(len(rows))
    faults = find_tiling_faults(
        tensors.shapes[rows],
        number.take(boxes.tensor.take(mine)),
        boxes.offsets.take(mine, axis=0),
        boxes.sizes.take(mine, axis=0),
    )
    if faults:
        raise _error(faults[0], int(rows[faults[0].tensor]), tensors, boxes, mine)


def _tiled_slab_by_slab(shapes: I64, boxes: HeldBoxes) -> Bool:
    """(K,) which tensors are tiled by slabs of the first dimension, each of them tiled by slabs
    of the next, and so on: every grid is, so every tensor that a mesh shards.

    Boxes are sorted, so neighbours tell: where two share their place in dimension ``d``, their
    extents there must be the same; where not, the second must begin where the first ends.
    """
    result = np.zeros(len(shapes), dtype=np.bool_)
    for block in run_blocks(boxes.tensor):
        tensor = boxes.tensor[block]
        good = _in_slabs(shapes, tensor, boxes.offsets[block], boxes.sizes[block])
        result[tensor] = True
        result[tensor[~good]] = False
    return result


def _in_slabs(shapes: I64, tensor: I32, offsets: I64, sizes: I64) -> Bool:
    """(N,) which boxes of some tensors go on where the box before them ends."""
    extents = shapes.take(tensor, axis=0)
    good = np.ones(len(tensor), dtype=np.bool_)
    inside = tensor[1:] == tensor[:-1]  # both in one slab of the dimensions so far
    edge = np.ones(1, dtype=np.bool_)
    for d in range(shapes.shape[1]):
        offset, size = offsets[:, d], sizes[:, d]
        end = offset + size
        good &= (offset == 0) | np.concatenate((~edge, inside))
        good &= (end == extents[:, d]) | np.concatenate((inside, ~edge))
        same = offset[1:] == offset[:-1]
        good[1:] &= ~inside | np.where(same, size[1:] == size[:-1], offset[1:] == end[:-1])
        inside &= same
    return good


def _error(
    fault: TilingFault, row: int, tensors: TensorTable, boxes: HeldBoxes, mine: I64
) -> InvalidPlanError:
    ndim = int(tensors.ndims[row])
    shape = tensors.shapes[row, :ndim].tolist()
    at = list(fault.point[:ndim])
    told = []
    for index in fault.rows[:_SHOWN_BOXES]:
        box = int(mine[index])
        first, count = int(boxes.first[box]), int(boxes.count[box])
        holders = format_ranks(boxes.rank[first : first + count].tolist())
        extent = describe_box(boxes.offsets[box, :ndim], boxes.sizes[box, :ndim])
        told.append(f"{extent} ({holders})")
    if fault.kind == "gap":
        own = np.flatnonzero(boxes.tensor == row)
        held = {int(r) for box in own.tolist() for r in _holders(boxes, box)}
        source = f"the shards on {format_ranks(held)}" if held else "any rank (no shard at all)"
        return InvalidPlanError(
            f"element {at} of shape {shape} is not covered by {source}",
            kind="plan_gap",
            tensor=tensors.names[row],
            hint="every part of the tensor must be held by a rank that takes part in the save",
        )
    return InvalidPlanError(
        f"element {at} of shape {shape} lies in several boxes: {' and '.join(told)}",
        kind="plan_overlap",
        tensor=tensors.names[row],
        hint="the ranks' shards must be parts of one layout",
    )


def _holders(boxes: HeldBoxes, box: int) -> list[int]:
    first, count = int(boxes.first[box]), int(boxes.count[box])
    ranks: list[int] = boxes.rank[first : first + count].tolist()
    return ranks
