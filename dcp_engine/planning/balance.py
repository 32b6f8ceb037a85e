"""Which holder writes how much of what several ranks hold.

Boxes with one holder are its to write. The rest is shared out class by class (a class: the boxes
held by the same ranks), fewest holders first, because those have the least choice. Within a class
the emptiest ranks are filled up to a common level, in one pass over the boxes in plan order: a
box that crosses a border between two ranks is cut there, at a row, and what is too small to be
cut goes whole to one side. So large tensors are split, and small ones stay together, on as few
ranks as the balance allows.

Belongs here: that decision, on arrays. Does not belong here: finding holders (``unite``) and
positions in files (``layout``).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcp_engine.errors import InvalidPlanError
from dcp_engine.planning.arrays import blocks, row_products, stable_order
from dcp_engine.planning.columns import I32, I64
from dcp_engine.planning.unite import HeldBoxes

__all__ = ["BalanceOptions", "Pieces", "share_out", "with_whole"]

F64 = npt.NDArray[np.float64]

_SHARE = 0.02
"""Grain, as a part of the mean load: a border that is off by half a grain on either side keeps
the fullest rank within 1.05 of the mean."""


@dataclass(frozen=True, kw_only=True)
class BalanceOptions:
    """How finely replicated data may be spread.

    The grain is 2 % of the mean load, within these bounds (bytes): boxes are not cut into pieces
    below it, and no rank is given less than it.
    """

    finest: int = 64 << 10
    coarsest: int = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """P written pieces, sorted like the boxes they are parts of."""

    box: I64
    """(P,) row of ``HeldBoxes``."""
    holder: I64
    """(P,) row of ``HeldBoxes.rank`` and ``source``."""
    row: I64
    """(P,) where it begins in the box, in rows of its first dimension longer than 1."""
    rows: I64
    """(P,) how many rows it has."""


def share_out(
    boxes: HeldBoxes,
    itemsize: I64,
    world_size: int,
    *,
    to_lowest_rank: bool = False,
    options: BalanceOptions | None = None,
) -> Pieces:
    """Decide who writes each box that several ranks hold, which are few; ``with_whole`` adds the
    others.

    Args:
        boxes: sorted distinct boxes and their holders.
        itemsize: (K,) bytes per element of each tensor.
        to_lowest_rank: give every box whole to the lowest rank that holds it.
    """
    several = np.flatnonzero(boxes.count > 1)
    heights = _heights(boxes.sizes[several])
    if to_lowest_rank or not len(several):
        first = boxes.first[several]
        return Pieces(box=several, holder=first, row=np.zeros_like(several), rows=heights)
    loads = _loads_of_single_holders(boxes, itemsize, world_size)
    nbytes = row_products(boxes.sizes[several]) * itemsize.take(boxes.tensor[several])
    options = options or BalanceOptions()
    mean = (float(loads.sum()) + float(nbytes.sum())) / world_size
    grain = int(min(max(mean * _SHARE, options.finest), options.coarsest))
    rule = _Rule(grain=max(1, grain), coarse=max(1, grain, int(mean * _SHARE)))
    parts: list[Pieces] = []
    for members in _classes(boxes, several):
        first = boxes.first[several[members]]
        ranks = boxes.rank[first[0] : first[0] + int(boxes.count[several[members[0]]])]
        box, rank_at, row, rows = _share_class(
            nbytes[members], heights[members], loads[ranks], ranks, rule
        )
        np.add.at(loads, ranks[rank_at], rows * (nbytes[members] // heights[members])[box])
        parts.append(
            Pieces(box=several[members[box]], holder=first[box] + rank_at, row=row, rows=rows)
        )
    return _joined(parts)


def with_whole(boxes: HeldBoxes, shared: Pieces, block: slice) -> Pieces:
    """All pieces of the boxes ``block``: those of ``shared``, which ``share_out`` returned, and
    each box with one holder in one piece."""
    begin, end = np.searchsorted(shared.box, (block.start, block.stop))
    mine = shared.box[begin:end] - block.start
    pieces = np.bincount(mine, minlength=block.stop - block.start)
    box = np.repeat(np.arange(block.start, block.stop), np.maximum(pieces, 1))
    holder = boxes.first.take(box)
    row = np.zeros_like(box)
    rows = _heights(boxes.sizes.take(box, axis=0))
    at = np.flatnonzero(pieces.take(box - block.start))
    holder[at], row[at], rows[at] = (
        column[begin:end] for column in (shared.holder, shared.row, shared.rows)
    )
    return Pieces(box=box, holder=holder, row=row, rows=rows)


def _loads_of_single_holders(boxes: HeldBoxes, itemsize: I64, world_size: int) -> F64:
    """(W,) bytes that each rank has to write whoever writes the rest. Exact: sums stay far below
    2^53 bytes, or the rounding is far below a grain."""
    loads = np.zeros(world_size)
    for block in blocks(len(boxes.tensor)):
        single = np.flatnonzero(boxes.count[block] == 1)
        nbytes = row_products(boxes.sizes[block]) * itemsize.take(boxes.tensor[block])
        ranks = boxes.rank.take(boxes.first[block].take(single))
        loads += np.bincount(ranks, weights=nbytes.take(single), minlength=world_size)
    return loads


@dataclass(frozen=True, kw_only=True)
class _Rule:
    grain: int
    coarse: int
    """What cannot be cut finer than this is placed one by one, the largest first."""


def _heights(sizes: I64) -> I64:
    """Rows along the first dimension longer than 1: each is one run of a box's elements."""
    heights = np.ones(len(sizes), dtype=np.int64)
    for column in sizes.T:
        np.copyto(heights, column, where=heights == 1)
    return heights


def _classes(boxes: HeldBoxes, several: I64) -> list[I64]:
    """Which of ``several`` are held by the same ranks: fewest holders first, then by first box."""
    count = boxes.count[several]
    begin = np.cumsum(count) - count
    holders = np.repeat(boxes.first[several] - begin, count) + np.arange(int(count.sum()))
    ranks = boxes.rank.take(holders)
    keys = np.add.reduceat(_scatter(ranks), begin)
    order = np.lexsort((np.arange(len(several)), keys, count))
    changed = (np.diff(keys[order]) != 0) | (np.diff(count[order]) != 0)
    classes = [np.sort(part) for part in np.split(order, np.flatnonzero(changed) + 1)]
    classes.sort(key=lambda part: (int(count[part[0]]), int(part[0])))
    for part in classes:
        rows = begin[part][:, None] + np.arange(int(count[part[0]]))
        if (ranks[rows] != ranks[rows[0]]).any():
            raise InvalidPlanError("two sets of ranks have one 64-bit key; this cannot happen")
    return classes


def _scatter(ranks: I32) -> npt.NDArray[np.uint64]:
    """A fixed random-looking number per rank (splitmix64), so that sums tell sets apart."""
    z = (ranks.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _share_class(
    nbytes: I64, heights: I64, loads: F64, ranks: I32, rule: _Rule
) -> tuple[I64, I64, I64, I64]:
    """Box, position among ``ranks``, first row and rows of each piece, sorted by box and row."""
    total = float(nbytes.sum())
    quota = _fill_up(loads, ranks, total, max(1, int(total // rule.grain)))
    row_bytes = nbytes // heights
    # A box that must not be cut is one row as high as itself.
    whole = nbytes < 2 * rule.grain
    unit = np.where(whole, nbytes, row_bytes)
    coarse = np.flatnonzero(unit > rule.coarse)
    pieces = _place_coarse(coarse, unit, nbytes, quota, row_bytes)
    fine = np.flatnonzero(unit <= rule.coarse)
    pieces.append(_cut_line(fine, nbytes, row_bytes, whole, quota, rule.grain))
    box, at, row, rows = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.lexsort((row, box))
    return box[order], at[order], row[order], rows[order]


def _fill_up(loads: F64, ranks: I32, total: float, most: int) -> F64:
    """(R,) how many bytes each rank takes so that all that take some end at one level. At most
    ``most`` ranks take some: the emptiest, then the lowest."""
    order = np.lexsort((ranks, loads))[:most]
    sorted_loads = loads[order]
    # With the n emptiest ranks filled, the level is (total + their loads) / n.
    n = np.arange(1, len(order) + 1)
    levels = (total + np.cumsum(sorted_loads)) / n
    filled = int(np.flatnonzero(levels >= sorted_loads)[-1]) + 1
    quota = np.zeros(len(loads))
    quota[order[:filled]] = np.maximum(levels[filled - 1] - sorted_loads[:filled], 0.0)
    return quota


def _place_coarse(
    coarse: I64, unit: I64, nbytes: I64, quota: F64, row_bytes: I64
) -> list[tuple[I64, I64, I64, I64]]:
    """Boxes of rows above the grain: the largest rows first, each run of rows to the rank with
    the most room. ``quota`` is reduced. There are at most some 50 such rows a rank."""
    pieces: list[tuple[int, int, int, int]] = []
    room = [(-float(q), at) for at, q in enumerate(quota)]
    heapq.heapify(room)
    for box in sorted(coarse.tolist(), key=lambda b: (-int(unit[b]), b)):
        size, position = int(unit[box]), 0
        units = int(nbytes[box]) // size
        rows_per_unit = size // int(row_bytes[box])
        while position < units:
            free, at = room[0]
            take = min(units - position, max(1, int(-free // size)))
            pieces.append((box, at, position * rows_per_unit, take * rows_per_unit))
            heapq.heapreplace(room, (free + take * size, at))
            position += take
    for free, at in room:
        quota[at] = max(0.0, -free)
    columns = np.array(pieces, dtype=np.int64).reshape(-1, 4)
    return [(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3])]


def _cut_line(
    fine: I64,
    nbytes: I64,
    row_bytes: I64,
    whole: npt.NDArray[np.bool_],
    quota: F64,
    grain: int,
) -> tuple[I64, I64, I64, I64]:
    """Lay the boxes end to end and cut the line by the ranks' quotas."""
    ends = np.cumsum(nbytes[fine])
    total = int(ends[-1]) if len(fine) else 0
    takers = np.flatnonzero(quota > 0)
    if not len(takers):  # what was placed one by one went over its quota
        takers = np.zeros(1, dtype=np.intp)
        quota = np.ones(len(quota))
    shares = np.cumsum(quota[takers])
    marks = shares[:-1] / shares[-1] * total
    hit = np.searchsorted(ends, marks, side="right").clip(max=max(len(fine) - 1, 0))
    if total == 0:
        marks, hit = marks[:0], hit[:0]
    box = fine[hit]
    begin = ends[hit] - nbytes[box]
    inside = np.rint((marks - begin) / row_bytes[box]).astype(np.int64) * row_bytes[box]
    least = np.where(whole[box], nbytes[box] // 2, grain // 2)
    # Pieces below the grain: the nearer of no piece and one of the grain.
    smallest = -(-np.int64(grain) // row_bytes[box]) * row_bytes[box]
    inside = np.where(inside < smallest, np.where(inside <= least, 0, smallest), inside)
    rest = nbytes[box] - inside
    rest = np.where(rest < smallest, np.where(rest <= least, 0, smallest), rest)
    inside = nbytes[box] - rest
    inside = np.where(
        whole[box], np.where(marks - begin <= nbytes[box] / 2, 0, nbytes[box]), inside
    )
    cuts = np.maximum.accumulate(begin + np.clip(inside, 0, nbytes[box]))
    cuts = _apart(cuts, box, smallest)
    begins = np.unique(np.concatenate((ends - nbytes[fine], cuts)))
    begins = begins[begins < total]
    piece_ends = np.append(begins[1:], total)
    of = np.searchsorted(ends, begins, side="right")
    at = takers[np.searchsorted(cuts, begins, side="right")]
    height = row_bytes[fine[of]]
    row = (begins - (ends[of] - nbytes[fine[of]])) // height
    return fine[of], at.astype(np.int64), row, (piece_ends - begins) // height


def _apart(cuts: I64, box: I64, smallest: I64) -> I64:
    """Where two cuts through one box leave less than the grain between them, the rank that it was
    for gets nothing of the box."""
    near = (box[1:] == box[:-1]) & (np.diff(cuts) < smallest[1:])
    for second in (np.flatnonzero(near) + 1).tolist():
        # As it is now: the cut before this one may have moved.
        if cuts[second] - cuts[second - 1] < smallest[second]:
            cuts[second] = cuts[second - 1]
    return cuts


def _joined(parts: list[Pieces]) -> Pieces:
    box, holder, row, rows = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("box", "holder", "row", "rows")
    )
    order = stable_order(box)
    return Pieces(box=box[order], holder=holder[order], row=row[order], rows=rows[order])
