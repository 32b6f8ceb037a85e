"""The stretches in which what several ranks need is read, and by whom.

Belongs here: cutting chunks at block borders by who needs them, and choosing the readers, balanced
by bytes. Does not belong here: rounds (``shared_rounds``), each rank's part (``shared_reads``).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from dcp_engine.geometry.row_major import elements_before
from dcp_engine.planning.arrays import row_products, segment_positions
from dcp_engine.planning.shared_interests import InterestTable
from dcp_engine.planning.shared_rounds import in_order

__all__ = ["Slabs", "Spans", "worth_sharing"]

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

MAX_EXCESS = 1.02
"""Chunks of which the ranks would read at most so many times the bytes they need are not handed
on."""
MAX_GAP = 64 << 10
"""Up to so many bytes between its runs, a strided box is read with what lies between them."""
MAX_PAIRS = 1 << 24
"""Segments times the ranks that need them: beyond, planning would cost more than it saves
(seconds, and a gigabyte on the coordinator), and every rank reads for itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spans:
    """Where the blocks of each row's box lie, on one line on which all chunks follow each other,
    each from a block border on."""

    begin: I64
    end: I64
    base: I64
    """Where the chunk begins on the line."""
    cost: I64
    """Bytes that the rank would read for this box by itself."""
    exact: I64
    """Bytes of the box; the same as the span's where it is one run."""

    @staticmethod
    def of(table: InterestTable, block_size: int) -> Spans:
        first = np.zeros(len(table.rank), np.int64)
        last = np.zeros(len(table.rank), np.int64)
        run = np.ones(len(table.rank), np.int64)
        whole = np.ones(len(table.rank), np.bool_)
        for d in range(table.within.shape[1]):
            sizes, within, lengths = (
                column[:, d] for column in (table.chunk_sizes, table.within, table.lengths)
            )
            first = first * sizes + within
            last = last * sizes + within + lengths - 1
        for d in range(table.within.shape[1] - 1, -1, -1):
            run = np.where(whole, run * table.lengths[:, d], run)
            whole &= table.lengths[:, d] == table.chunk_sizes[:, d]
        elements = row_products(table.lengths)
        begin = first * table.itemsize // block_size * block_size
        end = -(-(last + 1) * table.itemsize // block_size) * block_size
        end = np.minimum(end, table.nbytes)
        runs = elements // np.maximum(run, 1)
        # Upper dimensions of size 1 make a box look strided that is one run.
        single = (last - first + 1 == elements) | (runs == 1)
        gap = (last - first + 1 - elements) // np.maximum(runs - 1, 1) * table.itemsize
        apart = runs * (-(-run * table.itemsize // block_size) + 1) * block_size
        cost = np.where(single | (gap <= MAX_GAP), end - begin, np.minimum(apart, end - begin))
        new = np.diff(table.chunk, prepend=-1) != 0
        rounded = -(-table.nbytes // block_size) * block_size
        ends = np.cumsum(np.where(new, rounded, 0))
        base = ends - rounded if len(ends) else ends
        return Spans(
            begin=base + begin,
            end=base + end,
            base=base,
            cost=cost,
            exact=np.where(single, end - begin, elements * table.itemsize),
        )

    def take(self, rows: Bool) -> Spans:
        return Spans(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def worth_sharing(table: InterestTable, spans: Spans) -> Bool:
    """Rows of chunks of which the ranks would read much more than they need together."""
    if not len(table.rank):
        return np.zeros(0, np.bool_)
    _, chunk = np.unique(table.chunk, return_inverse=True)
    order = np.argsort(spans.begin, kind="stable")
    begin, end = spans.begin[order], spans.end[order]
    reach = np.maximum.accumulate(end)
    before = np.concatenate(([0], reach[:-1]))
    fresh = np.maximum(end - np.maximum(begin, before), 0)
    union = np.bincount(chunk[order], fresh)
    exact = np.bincount(chunk, spans.exact)
    cost = np.bincount(chunk, spans.cost)
    worth: Bool = cost > MAX_EXCESS * np.minimum(union, exact)
    return worth[chunk]


@dataclass(frozen=True, kw_only=True, eq=False)
class Slabs:
    """Slabs, and their pieces."""

    begin: I64
    """(S,) inside the chunk."""
    end: I64
    reader: I64
    round: I64
    piece_slab: I64
    """(P,) pieces by slab, then receiver, then row."""
    piece_row: I64
    """(P,) row of the table."""
    piece_bytes: I64

    @staticmethod
    def none() -> Slabs:
        return Slabs(**{f.name: np.zeros(0, np.int64) for f in fields(Slabs)})

    @staticmethod
    def of(table: InterestTable, spans: Spans, cut: int, round_bytes: int, loads: F64) -> Slabs:
        """Slabs of at most ``cut`` bytes; a rank begins no slab in a round in which it has read
        ``round_bytes``. ``loads``: (N,) bytes that each rank reads besides."""
        cuts = np.unique(np.concatenate([spans.begin, spans.end]))
        low, high = np.searchsorted(cuts, spans.begin), np.searchsorted(cuts, spans.end)
        steps = -(-np.diff(cuts, append=cuts[-1:]) // cut)
        before = np.concatenate(([0], np.cumsum(steps)))
        first, last = before[low], before[high]
        if int((last - first).sum()) > MAX_PAIRS:
            return Slabs.none()
        # Slabs of the whole line, those in between chunks too, which no row asks for.
        at = np.repeat(cuts, steps) + segment_positions(steps) * cut
        stop = np.minimum(at + cut, np.repeat(np.append(cuts[1:], cuts[-1:]), steps))
        counts = last - first
        row = np.repeat(np.arange(len(low), dtype=np.int64), counts)
        slab = np.repeat(first, counts) + segment_positions(counts)
        row, slab, nbytes = _with_elements(table, spans, row, slab, at, stop)
        order = np.lexsort((table.row[row], table.rank[row], slab))
        row, slab, nbytes = row[order], slab[order], nbytes[order]
        used, number = np.unique(slab, return_inverse=True)
        base = np.zeros(len(used), np.int64)
        base[number] = spans.base[row]
        begin, end = at[used], stop[used]
        reader, alone = _readers(number, table.rank[row], end - begin, loads)
        return Slabs(
            begin=begin - base,
            end=end - base,
            reader=reader,
            round=in_order(reader, np.where(alone, 0, end - begin), alone, round_bytes),
            piece_slab=number,
            piece_row=row,
            piece_bytes=nbytes,
        )


def _with_elements(
    table: InterestTable, spans: Spans, row: I64, slab: I64, at: I64, stop: I64
) -> tuple[I64, I64, I64]:
    """Pairs of a row and a slab that have an element in common, and how many bytes: the runs of a
    strided box may leave a slab out."""
    sizes, within, lengths = table.chunk_sizes[row], table.within[row], table.lengths[row]
    itemsize = table.itemsize[row]
    begin = (at[slab] - spans.base[row]) // itemsize
    end = (stop[slab] - spans.base[row]) // itemsize
    held = elements_before(sizes, within, lengths, end)
    held -= elements_before(sizes, within, lengths, begin)
    some = held > 0
    return row[some], slab[some], (held * itemsize)[some]


def _readers(number: I64, rank: I64, nbytes: I64, loads: F64) -> tuple[I64, Bool]:
    """Each slab's reader, and whether nobody else needs the slab.

    ``number`` and ``rank`` (P,) are pieces, sorted. Slabs that the same ranks need are given out
    in order, to each rank a stretch: what lies together is read together.
    """
    fresh = np.ones(len(number), np.bool_)
    fresh[1:] = (number[1:] != number[:-1]) | (rank[1:] != rank[:-1])
    number, rank = number[fresh], rank[fresh]
    bounds = np.searchsorted(number, np.arange(len(nbytes) + 1))
    groups: dict[bytes, list[int]] = {}
    data = rank.astype(np.int64)
    for slab, (low, high) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        groups.setdefault(data[low:high].tobytes(), []).append(slab)
    reader = np.zeros(len(nbytes), np.int64)
    alone = bounds[1:] - bounds[:-1] == 1
    loads = loads.copy()
    # Those with the least choice first.
    for key in sorted(groups, key=lambda key: (len(key), groups[key][0])):
        slabs = np.array(groups[key], np.int64)
        members = np.frombuffer(key, np.int64)
        size = nbytes[slabs].astype(np.float64)
        edges = np.cumsum(_filled(loads[members], float(size.sum())))
        middle = np.cumsum(size) - size / 2
        chosen = np.minimum(np.searchsorted(edges, middle, side="right"), len(members) - 1)
        reader[slabs] = members[chosen]
        loads += np.bincount(members[chosen], size, len(loads))
    return reader, alone


def _filled(loads: F64, total: float) -> F64:
    """How much of ``total`` each gets so that the fullest is as empty as can be."""
    ordered = np.sort(loads)
    held = np.cumsum(ordered)
    count = np.arange(1, len(loads) + 1)
    # With the first `count` sharing it, the level is this; it must not pass the next one.
    levels = (total + held) / count
    fits = levels <= np.append(ordered[1:], np.inf)
    level = float(levels[int(np.argmax(fits))])
    return np.maximum(level - loads, 0.0)
