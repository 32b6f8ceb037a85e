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
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dcp_engine.planning.shared_interests import (
    Interests,
    InterestTable,
    most_rows,
    needed_bytes,
    of_several,
)
from dcp_engine.planning.shared_rounds import ALONE, Pieces, within_limit
from dcp_engine.planning.shared_slabs import Slabs, Spans, worth_sharing

__all__ = ["ALONE", "RankShare", "plan_shared_reads", "slab_bytes_for"]

I64 = npt.NDArray[np.int64]

SLABS_PER_RANK = 4
"""At least about so many where there are blocks enough, for balance."""


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
    every = InterestTable.of(interests)
    table = of_several(every, block_size)
    spans = Spans.of(table, block_size)
    shared = worth_sharing(table, spans)
    table, spans = table.take(shared), spans.take(shared)
    loads = needed_bytes(every, len(interests)) - needed_bytes(table, len(interests))
    rows = most_rows(table)
    slab_bytes = max(block_size, slab_bytes // rows // block_size * block_size)
    fair = int(spans.end.max(initial=0)) // (SLABS_PER_RANK * max(len(interests), 1))
    cut = min(slab_bytes, (fair // block_size + 1) * block_size)
    slabs = Slabs.of(table, spans, cut, slab_bytes, loads)
    # Two slabs, packed for all others as often as they ask, and as much from all others.
    if 2 * slab_bytes * (2 * rows * len(interests) + 1) > round_bytes:
        slabs = _within(slabs, table, len(interests), round_bytes)
    division = _Division(table, slabs, len(interests))
    return [division.of(rank, one.chunk_sizes.shape[1]) for rank, one in enumerate(interests)]


def _within(slabs: Slabs, table: InterestTable, world_size: int, limit: int) -> Slabs:
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
    return Slabs.none() if rounds is None else replace(slabs, round=rounds)


class _Division:
    """Slabs and pieces, cut up by rank; sorted once, whatever the number of ranks."""

    def __init__(self, table: InterestTable, slabs: Slabs, world_size: int) -> None:
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
