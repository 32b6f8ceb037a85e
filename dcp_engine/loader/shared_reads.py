"""Reading once what several ranks need, and handing it on.

Belongs here: carrying out one rank's part of ``planning.shared_reads``: which bytes go into which
memory, in which order, within bounds. Does not belong here: who reads what, connections and
waiting (``coordination.data_group``).

Rounds: a rank reads the slabs of round k while round k-1 travels. Two arenas take turns; each
holds the rank's slabs of a round, what it packed for others, and what comes from others.
"""

from __future__ import annotations

from concurrent.futures import Future
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from dcp_engine.coordination.data_group import DataGroup, Transfer
from dcp_engine.format.manifest import Manifest
from dcp_engine.geometry.row_major import elements_before
from dcp_engine.loader.slabs import Piece, Slab, Slabs, aligned
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.planning.load_plan import LoadSource
from dcp_engine.planning.shared_reads import ALONE, RankShare
from dcp_engine.state.adapters.memory import fill
from dcp_engine.storage import Check

__all__ = ["BUDGET_BYTES", "read_shared"]

BUDGET_BYTES = 128 << 20
"""What both arenas of a rank may hold; the reader's own scratch memory is the other half of the
256 MiB that a load is allowed beside its destination."""


def read_shared(
    reader: ColumnarReader,
    manifest: Manifest,
    source: LoadSource,
    share: RankShare,
    group: DataGroup,
    *,
    rank: int,
    slab_bytes: int,
    check: Check,
) -> int:
    """Fill all destinations of ``source``, this rank's part of the job included.

    Args:
        group: the ranks, connected.
        slab_bytes: the bound that ``share`` was planned with.

    Returns the number of bytes that this rank read. Raises what ``reader.read_columns`` raises,
    and ``CoordinationError(kind="rank_failed")`` when the connection to a rank breaks.
    """
    slabs = Slabs(reader, manifest, source, share, rank=rank, check=check)
    slabs.read_alone(2 * slab_bytes)
    _Exchange(slabs, group).run()
    return slabs.bytes_read


class _Exchange:
    """The exchange of one rank."""

    def __init__(self, slabs: Slabs, group: DataGroup) -> None:
        self._slabs = slabs
        self._group = group
        share, columns = slabs.share, slabs.columns
        self._count = 1 + max(
            int(share.slab_round.max(initial=ALONE)), int(share.receive_round.max(initial=ALONE))
        )
        numbers = np.arange(self._count + 1)
        self._slab_bounds = np.searchsorted(share.slab_round, numbers).tolist()
        self._receive_bounds = np.searchsorted(share.receive_round, numbers).tolist()
        row = share.receive_row
        itemsize = columns.itemsize[row]
        boxes = (columns.chunk_sizes[row], columns.within[row], columns.lengths[row])
        self._first = elements_before(*boxes, share.receive_begin // itemsize).tolist()
        self._last = elements_before(*boxes, share.receive_end // itemsize).tolist()
        self._row = row.tolist()
        self._from = share.receive_from.tolist()

    def run(self) -> None:
        if not self._count:
            return
        sizes = [self._arena_bytes(number) for number in range(self._count)]
        arenas = [
            torch.empty(max(sizes[turn::2], default=0), dtype=torch.uint8, device="cpu")
            for turn in (0, 1)
        ]
        before: _Travelling | None = None
        for number in range(self._count):
            travelling = self._start(number, arenas[number % 2])
            if before is not None:
                self._finish(before)
            before = travelling
        if before is not None:
            self._finish(before)

    def _start(self, number: int, arena: torch.Tensor) -> _Travelling:
        """Read and send one round, and get ready for what comes."""
        position = 0
        transfers: list[Transfer] = []
        arrivals: list[tuple[range, torch.Tensor]] = []
        for source, group in groupby(
            range(self._receive_bounds[number], self._receive_bounds[number + 1]),
            self._from.__getitem__,
        ):
            rows = list(group)
            nbytes = sum(self._arriving(row) for row in rows)
            message = arena[position : position + nbytes]
            position += nbytes
            transfers.append(self._group.receive(message, source, number))
            arrivals.append((range(rows[0], rows[-1] + 1), message))
        slabs = range(self._slab_bounds[number], self._slab_bounds[number + 1])
        own = arena[position:]
        memory = self._slabs.read_slabs(slabs, own) if slabs else []
        end = sum(aligned(self._slabs.nbytes_of(slab)) for slab in slabs)
        packed = end
        for to, pieces in self._messages(slabs):
            if _is_all_of(slabs, pieces):
                transfers.append(self._group.send(own[:end], to, number))
                continue
            nbytes = sum(self._leaving(piece) for piece in pieces)
            message = own[packed : packed + nbytes]
            packed += nbytes
            self._pack(pieces, memory, slabs, message)
            transfers.append(self._group.send(message, to, number))
        done = self._group.watch(transfers)
        for slab, held in zip(slabs, memory, strict=True):
            self._slabs.keep(slab, held.data)
        return _Travelling(done, arrivals)

    def _finish(self, round_: _Travelling) -> None:
        self._group.finish(round_.done)
        for rows, message in round_.arrivals:
            at = 0
            for row in rows:
                itemsize = self._slabs.itemsizes[self._row[row]]
                nbytes = (self._last[row] - self._first[row]) * itemsize
                data = message[at : at + nbytes].view(self._slabs.dtype_of(self._row[row]))
                self._slabs.put(self._row[row], self._first[row], self._last[row], data)
                at += aligned(nbytes)

    def _messages(self, slabs: range) -> list[tuple[int, list[Piece]]]:
        """The pieces of these slabs for each other rank."""
        by_rank: dict[int, list[Piece]] = {}
        for slab in slabs:
            for piece in self._slabs.pieces_of(slab):
                if piece.to != self._slabs.rank:
                    by_rank.setdefault(piece.to, []).append(piece)
        return sorted(by_rank.items())

    def _pack(
        self, pieces: list[Piece], memory: list[Slab], slabs: range, message: torch.Tensor
    ) -> None:
        at = 0
        for piece in pieces:
            data = memory[piece.slab - slabs.start].data
            into = message[at : at + self._leaving(piece)]
            at += into.numel()
            nbytes = (piece.last - piece.first) * data.element_size()
            elements = into[:nbytes].view(data.dtype)
            if piece.whole:
                fill(elements, data)
                continue
            done = 0
            for _, view in self._slabs.views(piece.slab, piece, data):
                fill(elements[done : done + view.numel()].view(view.shape), view)
                done += view.numel()

    def _leaving(self, piece: Piece) -> int:
        row = int(self._slabs.share.slab_row[piece.slab])
        return aligned((piece.last - piece.first) * self._slabs.itemsizes[row])

    def _arriving(self, row: int) -> int:
        itemsize = self._slabs.itemsizes[self._row[row]]
        return aligned((self._last[row] - self._first[row]) * itemsize)

    def _arena_bytes(self, number: int) -> int:
        slabs = range(self._slab_bounds[number], self._slab_bounds[number + 1])
        rows = range(self._receive_bounds[number], self._receive_bounds[number + 1])
        total = sum(aligned(self._slabs.nbytes_of(slab)) for slab in slabs)
        total += sum(self._arriving(row) for row in rows)
        for _, pieces in self._messages(slabs):
            if not _is_all_of(slabs, pieces):
                total += sum(self._leaving(piece) for piece in pieces)
        return total


class _Travelling(NamedTuple):
    """A round that was sent, and may not have arrived."""

    done: Future[None]
    arrivals: list[tuple[range, torch.Tensor]]


def _is_all_of(slabs: range, pieces: list[Piece]) -> bool:
    """Whether a message is the slabs as they lie in memory, so that nothing needs packing."""
    return [piece.slab for piece in pieces] == list(slabs) and all(p.whole for p in pieces)
