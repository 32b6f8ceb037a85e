"""Who reads what several ranks need, and to whom it is handed on.

A stored chunk that several ranks need, whole or in boxes, is cut at block borders into segments
by who needs them, and those into slabs of bounded size. Each slab is read once, by one of the
ranks that need it, balanced by bytes. Chunks of which ranks can read their parts by themselves
without reading much twice are left alone. Belongs here: pure decisions on columns, the same on
every run. Does not belong here: messages (``shared_wire``), reading and sending
(``loader.shared_reads``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from dcp_engine.geometry.row_major import elements_before
from dcp_engine.planning.arrays import pad_columns, row_products, segment_positions
from dcp_engine.planning.columns import LoadColumns
from dcp_engine.planning.shared_rounds import ALONE, Pieces, in_order, within_limit

__all__ = [
    "ALONE",
    "Interests",
    "RankShare",
    "interests_of",
    "plan_shared_reads",
    "slab_bytes_for",
]

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

MAX_EXCESS = 1.02
"""Chunks of which the ranks would read at most so many times the bytes they need are not handed
on."""
MAX_GAP = 64 << 10
"""Up to so many bytes between its runs, a strided box is read with what lies between them."""
SLABS_PER_RANK = 4
"""At least about so many where there are blocks enough, for balance."""
MAX_PAIRS = 1 << 24
"""Segments times the ranks that need them: beyond, planning would cost more than it saves
(seconds, and a gigabyte on the coordinator), and every rank reads for itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Interests:
    """What one rank needs of stored chunks: the columns of its ``LoadColumns`` that matter to
    others, in the same order; ``(R,)`` and ``(R, D)``."""

    file: I64
    chunk_start: I64
    itemsize: I64
    chunk_sizes: I64
    within: I64
    lengths: I64


@dataclass(frozen=True, kw_only=True, eq=False)
class RankShare:
    """One rank's part. Rows are those of its own ``LoadColumns``; positions are bytes from the
    begin of the chunk.

    Messages: in each round a rank sends at most one to each other, which holds the pieces of its
    slabs of that round for that rank, in the order of ``sends`` there and ``receives`` here. A
    piece is what the slab holds of the receiver's box, in row-major order without gaps.
    """

    rows: I64
    """Rows that are served by slabs, its own or others'; all others it reads directly."""
    slab_row: I64
    """(S,) slabs this rank reads, by round; the row that names the chunk."""
    slab_begin: I64
    slab_end: I64
    slab_round: I64
    """``ALONE`` first."""
    send_slab: I64
    """(P,) row of the slabs; ascending."""
    send_to: I64
    """A rank; its own for pieces that it keeps."""
    send_row: I64
    """The receiver's row; only of use to the receiver."""
    send_within: I64
    """(P, D) the receiver's box in the chunk."""
    send_lengths: I64
    receive_round: I64
    """(Q,) pieces that come from other ranks, by round, then sender."""
    receive_from: I64
    receive_row: I64
    receive_begin: I64
    receive_end: I64


def interests_of(columns: LoadColumns) -> Interests:
    """What the rank that reads ``columns`` tells the others."""
    return Interests(
        file=columns.file.astype(np.int64),
        chunk_start=columns.chunk_start,
        itemsize=columns.itemsize,
        chunk_sizes=columns.chunk_sizes,
        within=columns.within,
        lengths=columns.lengths,
    )


def slab_bytes_for(*, world_size: int, block_size: int, budget: int) -> int:
    """The largest slab with which no rank holds more than ``budget`` bytes at once.

    A rank holds two rounds at a time (one is read while the other travels); of each its own slabs
    (up to two slabs' size), their pieces packed for up to all others, and as much from all others.
    """
    most = budget // (2 * 2 * (2 * world_size + 1))
    return max(most - most % block_size, block_size)


def plan_shared_reads(
    interests: Sequence[Interests], *, block_size: int, slab_bytes: int, round_bytes: int
) -> list[RankShare]:
    """Every rank's part. Nothing is handed on where that would take too much memory.

    Args:
        interests: by rank.
        block_size: bytes of a digest block; slabs begin and end at multiples of it.
        slab_bytes: the most bytes of a slab, a multiple of ``block_size``; a rank reads at most
            twice as much in a round. Where there is little to read, slabs are smaller, so that
            each rank gets its part.
        round_bytes: what a rank may hold for a round: its slabs, packed pieces of them and what
            others send.
    """
    every = _Table.of(interests)
    table = _several(every, block_size)
    spans = _Spans.of(table, block_size)
    shared = _worth_sharing(table, spans)
    table, spans = table.take(shared), spans.take(shared)
    loads = _needed(every, len(interests)) - _needed(table, len(interests))
    rows = _most_rows(table)
    slab_bytes = max(block_size, slab_bytes // rows // block_size * block_size)
    fair = int(spans.end.max(initial=0)) // (SLABS_PER_RANK * max(len(interests), 1))
    cut = min(slab_bytes, (fair // block_size + 1) * block_size)
    slabs = _Slabs.of(table, spans, cut, slab_bytes, loads)
    # Two slabs, packed for all others as often as they ask, and as much from all others.
    if 2 * slab_bytes * (2 * rows * len(interests) + 1) > round_bytes:
        slabs = _within(slabs, table, len(interests), round_bytes)
    division = _Division(table, slabs, len(interests))
    return [division.of(rank, one.chunk_sizes.shape[1]) for rank, one in enumerate(interests)]


def _within(slabs: _Slabs, table: _Table, world_size: int, limit: int) -> _Slabs:
    """``slabs`` in rounds that take no rank more than ``limit`` bytes; none of them if there are no
    such rounds."""
    rounds = within_limit(
        slabs.round,
        slabs.reader,
        slabs.end - slabs.begin,
        Pieces(slab=slabs.piece_slab, to=table.rank[slabs.piece_row], nbytes=slabs.piece_bytes),
        world_size=world_size,
        limit=limit,
    )
    return _Slabs.none() if rounds is None else replace(slabs, round=rounds)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """All ranks' interests, T rows, by file and chunk, then rank and row."""

    rank: I64
    row: I64
    chunk: I64
    """Number of the chunk: rows of one chunk have the same."""
    nbytes: I64
    """Of the chunk."""
    itemsize: I64
    chunk_sizes: I64
    within: I64
    lengths: I64

    @staticmethod
    def of(interests: Sequence[Interests]) -> _Table:
        width = max([1, *(one.chunk_sizes.shape[1] for one in interests)])
        counts = [len(one.file) for one in interests]
        row = segment_positions(np.array(counts, np.int64))
        rank = np.repeat(np.arange(len(interests), dtype=np.int64), counts)
        file, start, itemsize = (
            np.concatenate([getattr(one, name) for one in interests])
            for name in ("file", "chunk_start", "itemsize")
        )
        sizes, within, lengths = (
            np.concatenate([pad_columns(getattr(one, name), width, fill) for one in interests])
            for name, fill in (("chunk_sizes", 1), ("within", 0), ("lengths", 1))
        )
        order = np.lexsort((row, rank, start, file))
        file, start = file[order], start[order]
        new = np.ones(len(file), np.bool_)
        new[1:] = (file[1:] != file[:-1]) | (start[1:] != start[:-1])
        sizes, itemsize = sizes[order], itemsize[order]
        return _Table(
            rank=rank[order],
            row=row[order],
            chunk=np.cumsum(new) - 1,
            nbytes=row_products(sizes) * itemsize,
            itemsize=itemsize,
            chunk_sizes=sizes,
            within=within[order],
            lengths=lengths[order],
        )

    def take(self, rows: Bool) -> _Table:
        return _Table(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def _needed(table: _Table, world_size: int) -> F64:
    """(N,) bytes that each rank needs."""
    nbytes = row_products(table.lengths) * table.itemsize
    return np.bincount(table.rank, nbytes, world_size).astype(np.float64)


def _most_rows(table: _Table) -> int:
    """The most boxes that one rank wants of one chunk: it gets a slab once for each, at worst."""
    new = np.ones(len(table.rank), np.bool_)
    new[1:] = (np.diff(table.chunk) != 0) | (np.diff(table.rank) != 0)
    return int(np.bincount(np.cumsum(new)).max(initial=1))


def _several(table: _Table, block_size: int) -> _Table:
    """The rows of chunks that more than one rank needs and that can be cut at block borders."""
    if not len(table.rank):
        return table
    first = np.flatnonzero(np.diff(table.chunk, prepend=-1))
    at = first[table.chunk]
    # What is stored under two names may have two shapes.
    alike = (
        (table.itemsize == table.itemsize[at])
        & (table.chunk_sizes == table.chunk_sizes[at]).all(axis=1)
        & (block_size % table.itemsize == 0)
        & (row_products(table.lengths) > 0)
    )
    other = table.rank != table.rank[at]
    chunks = int(table.chunk[-1]) + 1
    several = np.bincount(table.chunk, other, chunks) > 0
    several &= np.bincount(table.chunk, ~alike, chunks) == 0
    return table.take(several[table.chunk])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Spans:
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
    def of(table: _Table, block_size: int) -> _Spans:
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
        return _Spans(
            begin=base + begin,
            end=base + end,
            base=base,
            cost=cost,
            exact=np.where(single, end - begin, elements * table.itemsize),
        )

    def take(self, rows: Bool) -> _Spans:
        return _Spans(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def _worth_sharing(table: _Table, spans: _Spans) -> Bool:
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
class _Slabs:
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
    def none() -> _Slabs:
        return _Slabs(**{f.name: np.zeros(0, np.int64) for f in fields(_Slabs)})

    @staticmethod
    def of(table: _Table, spans: _Spans, cut: int, round_bytes: int, loads: F64) -> _Slabs:
        """Slabs of at most ``cut`` bytes; a rank begins no slab in a round in which it has read
        ``round_bytes``. ``loads``: (N,) bytes that each rank reads besides."""
        cuts = np.unique(np.concatenate([spans.begin, spans.end]))
        low, high = np.searchsorted(cuts, spans.begin), np.searchsorted(cuts, spans.end)
        steps = -(-np.diff(cuts, append=cuts[-1:]) // cut)
        before = np.concatenate(([0], np.cumsum(steps)))
        first, last = before[low], before[high]
        if int((last - first).sum()) > MAX_PAIRS:
            return _Slabs.none()
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
        return _Slabs(
            begin=begin - base,
            end=end - base,
            reader=reader,
            round=in_order(reader, np.where(alone, 0, end - begin), alone, round_bytes),
            piece_slab=number,
            piece_row=row,
            piece_bytes=nbytes,
        )


def _with_elements(
    table: _Table, spans: _Spans, row: I64, slab: I64, at: I64, stop: I64
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


class _Division:
    """Slabs and pieces, cut up by rank; sorted once, whatever the number of ranks."""

    def __init__(self, table: _Table, slabs: _Slabs, world_size: int) -> None:
        self._table = table
        self._slabs = slabs
        ranks = np.arange(world_size + 1)
        piece = np.arange(len(slabs.piece_slab), dtype=np.int64)
        slab = np.arange(len(slabs.reader), dtype=np.int64)
        self._by_reader = np.lexsort((slab, slabs.round, slabs.reader))
        self._reader_bounds = np.searchsorted(slabs.reader[self._by_reader], ranks)
        self._place = np.empty(len(slab), np.int64)
        self._place[self._by_reader] = slab - self._reader_bounds[slabs.reader[self._by_reader]]
        receiver = table.rank[slabs.piece_row]
        sender = slabs.reader[slabs.piece_slab]
        rounds = slabs.round[slabs.piece_slab]
        self._sent = np.lexsort((piece, self._place[slabs.piece_slab], sender))
        self._sent_bounds = np.searchsorted(sender[self._sent], ranks)
        got = np.flatnonzero(sender != receiver)
        self._got = got[np.lexsort((got, sender[got], rounds[got], receiver[got]))]
        self._got_bounds = np.searchsorted(receiver[self._got], ranks)
        self._rows = np.lexsort((table.row, table.rank))
        self._row_bounds = np.searchsorted(table.rank[self._rows], ranks)
        # Every slab has a piece for its reader, whose row names the chunk.
        self._names = np.zeros(len(slab), np.int64)
        kept = sender == receiver
        self._names[slabs.piece_slab[kept]] = table.row[slabs.piece_row[kept]]

    def of(self, rank: int, width: int) -> RankShare:
        table, slabs = self._table, self._slabs
        mine = self._by_reader[self._reader_bounds[rank] : self._reader_bounds[rank + 1]]
        sent = self._sent[self._sent_bounds[rank] : self._sent_bounds[rank + 1]]
        got = self._got[self._got_bounds[rank] : self._got_bounds[rank + 1]]
        rows = self._rows[self._row_bounds[rank] : self._row_bounds[rank + 1]]
        sent_row, got_slab = slabs.piece_row[sent], slabs.piece_slab[got]
        return RankShare(
            rows=table.row[rows] if len(slabs.reader) else rows[:0],
            slab_row=self._names[mine],
            slab_begin=slabs.begin[mine],
            slab_end=slabs.end[mine],
            slab_round=slabs.round[mine],
            send_slab=self._place[slabs.piece_slab[sent]],
            send_to=table.rank[sent_row],
            send_row=table.row[sent_row],
            send_within=table.within[sent_row, :width],
            send_lengths=table.lengths[sent_row, :width],
            receive_round=slabs.round[got_slab],
            receive_from=slabs.reader[got_slab],
            receive_row=table.row[slabs.piece_row[got]],
            receive_begin=slabs.begin[got_slab],
            receive_end=slabs.end[got_slab],
        )
