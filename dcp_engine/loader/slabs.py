"""Slabs of one rank in memory: read there, cut into pieces, and put where they belong.

Belongs here: which bytes of a slab are which elements of whose box. Does not belong here: the
order of rounds and what is sent when (``shared_reads``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.format.manifest import Manifest
from dcp_engine.geometry.row_major import elements_before, range_boxes
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.planning.arrays import row_products
from dcp_engine.planning.columns import LoadColumns
from dcp_engine.planning.load_plan import LoadSource
from dcp_engine.planning.shared_reads import ALONE, RankShare
from dcp_engine.state.adapters.memory import fill
from dcp_engine.storage import Check

__all__ = ["Piece", "Slab", "Slabs", "aligned"]

I64 = npt.NDArray[np.int64]

_ALIGNMENT = 16
"""Of slabs and pieces in their memory: the largest element."""


class Piece(NamedTuple):
    """Elements ``first`` to ``last`` of a rank's box, in row-major order."""

    slab: int
    to: int
    row: int
    first: int
    last: int
    begin: int
    """Element of the chunk where the slab begins."""
    within: list[int]
    lengths: list[int]
    whole: bool
    """It is all of the slab."""


class Slab(NamedTuple):
    """A slab in memory."""

    data: torch.Tensor
    """(n,) of the stored dtype, contiguous."""
    position: int
    """Byte in the arena, counted from the round's begin."""


class Slabs:
    """One rank's part of a load that hands on what it reads."""

    def __init__(
        self,
        reader: ColumnarReader,
        manifest: Manifest,
        source: LoadSource,
        share: RankShare,
        *,
        rank: int,
        check: Check,
    ) -> None:
        self.rank = rank
        self._reader = reader
        self._manifest = manifest
        self.columns = source.columns
        self._tensors = source.tensors
        self.share = share
        self._check = check
        self._ndims = source.columns.ndims.tolist()
        self.itemsizes = source.columns.itemsize.tolist()
        self._pieces = list(_pieces(source.columns, share))
        self._first_piece = np.searchsorted(
            share.send_slab, np.arange(len(share.slab_row) + 1)
        ).tolist()
        self.bytes_read = 0

    def pieces_of(self, slab: int) -> list[Piece]:
        """The pieces of a slab, this rank's own too, by receiver."""
        return self._pieces[self._first_piece[slab] : self._first_piece[slab + 1]]

    # What only this rank needs

    def read_alone(self, limit: int) -> None:
        """Read all that nobody else needs; what cannot be read where it belongs, through at most
        ``limit`` bytes."""
        share, columns = self.share, self.columns
        direct = np.setdiff1d(np.arange(len(columns.file)), share.rows)
        alone = np.flatnonzero(share.slab_round == ALONE).tolist()
        in_place: list[int] = []
        targets: list[torch.Tensor] = []
        staged: list[int] = []
        for slab in alone:
            target = self._memory_of(slab)
            if target is None:
                staged.append(slab)
            else:
                in_place.append(slab)
                targets.append(target)
        rows = _taken(columns, direct)
        slabs = self._slab_columns(in_place, first=len(self._tensors))
        self._read(_joined(rows, slabs), [*self._tensors, *targets])
        arena = torch.empty(limit if staged else 0, dtype=torch.uint8, device="cpu")
        for batch in self._batches(staged, limit):
            for slab, memory in zip(batch, self.read_slabs(batch, arena), strict=True):
                self.keep(slab, memory.data)

    def _memory_of(self, slab: int) -> torch.Tensor | None:
        """Where the slab belongs, if that is one stretch of memory to read into."""
        piece, *others = self.pieces_of(slab)
        if others or not piece.whole:
            return None
        box = self._box(piece.row)
        if not box.is_cpu or not box.is_contiguous() or box.is_conj() or box.is_neg():
            return None
        flat = box.view(-1)[piece.first : piece.last]
        return flat.view(self._slab_shape(slab))

    def _batches(self, slabs: Sequence[int], limit: int) -> Iterator[list[int]]:
        batch: list[int] = []
        held = 0
        for slab in slabs:
            size = aligned(self.nbytes_of(slab))
            if batch and held + size > limit:
                yield batch
                batch, held = [], 0
            batch.append(slab)
            held += size
        if batch:
            yield batch

    # Slabs

    def nbytes_of(self, slab: int) -> int:
        return int(self.share.slab_end[slab] - self.share.slab_begin[slab])

    def _slab_shape(self, slab: int) -> tuple[int, ...]:
        """The chunk's shape for a whole chunk, else one dimension."""
        row = int(self.share.slab_row[slab])
        sizes = self.columns.chunk_sizes[row, : self._ndims[row]].tolist()
        elements = self.nbytes_of(slab) // self.itemsizes[row]
        return tuple(sizes) if math.prod(sizes) == elements else (elements,)

    def read_slabs(self, slabs: Sequence[int], arena: torch.Tensor) -> list[Slab]:
        """Read slabs one behind the other into ``arena``."""
        found: list[Slab] = []
        targets: list[torch.Tensor] = []
        position = 0
        for slab in slabs:
            nbytes = self.nbytes_of(slab)
            dtype = self.dtype_of(int(self.share.slab_row[slab]))
            data = arena[position : position + nbytes].view(dtype)
            found.append(Slab(data, position))
            targets.append(data.view(self._slab_shape(slab)))
            position += aligned(nbytes)
        self._read(self._slab_columns(slabs, first=0), targets)
        return found

    def _slab_columns(self, slabs: Sequence[int], *, first: int) -> LoadColumns:
        """Rows that read ``slabs`` into the tensors from number ``first`` on."""
        share = self.share
        chosen = np.array(slabs, np.int64)
        columns = _taken(self.columns, share.slab_row[chosen])
        begin = share.slab_begin[chosen] // columns.itemsize
        count = (share.slab_end[chosen] - share.slab_begin[chosen]) // columns.itemsize
        whole = count == row_products(columns.chunk_sizes)
        within = np.zeros_like(columns.within)
        within[:, 0] = begin
        lengths = np.ones_like(columns.lengths)
        lengths[:, 0] = count
        return replace(
            columns,
            within=within,
            lengths=np.where(whole[:, None], columns.chunk_sizes, lengths),
            dest=np.arange(first, first + len(chosen), dtype=np.int32),
            dest_within=np.zeros_like(within),
            flat=~whole,
        )

    def _read(self, columns: LoadColumns, tensors: Sequence[torch.Tensor]) -> None:
        self._check()
        if len(columns.file):
            self.bytes_read += self._reader.read_columns(
                self._manifest, columns, tensors, self._check
            )

    # Destinations

    def dtype_of(self, row: int) -> torch.dtype:
        return self._tensors[int(self.columns.dest[row])].dtype

    def _box(self, row: int) -> torch.Tensor:
        """The part of the destination that ``row`` fills."""
        box = self._tensors[int(self.columns.dest[row])].detach()
        for d in range(self._ndims[row]):
            length = int(self.columns.lengths[row, d])
            if length != box.shape[d]:
                box = box.narrow(d, int(self.columns.dest_within[row, d]), length)
        return box

    def keep(self, slab: int, data: torch.Tensor) -> None:
        """Copy this rank's own pieces of a slab to where they belong."""
        for piece in self.pieces_of(slab):
            if piece.to != self.rank:
                continue
            box = self._box(piece.row)
            for offsets, view in self.views(slab, piece, data):
                fill(_narrowed(box, offsets, view.shape), view)

    def views(
        self, slab: int, piece: Piece, data: torch.Tensor
    ) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """The piece as parts of the slab: offsets in the receiver's box, and elements."""
        row = int(self.share.slab_row[slab])
        ndim = self._ndims[row]
        sizes = self.columns.chunk_sizes[row, :ndim].tolist()
        strides = [1] * ndim
        for d in range(ndim - 2, -1, -1):
            strides[d] = strides[d + 1] * sizes[d + 1]
        for offsets, lengths in range_boxes(piece.lengths[:ndim], piece.first, piece.last):
            start = -piece.begin + data.storage_offset()
            for within, offset, stride in zip(piece.within, offsets, strides, strict=False):
                start += (within + offset) * stride
            yield offsets, data.as_strided(lengths, strides, start)

    def put(self, row: int, first: int, last: int, data: torch.Tensor) -> None:
        """Copy elements ``first`` to ``last`` of the box of ``row``, which lie in ``data``."""
        box = self._box(row)
        at = 0
        for offsets, lengths in range_boxes(tuple(box.shape), first, last):
            part = _narrowed(box, offsets, lengths)
            fill(part, data[at : at + part.numel()].view(lengths))
            at += part.numel()


def _pieces(columns: LoadColumns, share: RankShare) -> Iterator[Piece]:
    """The pieces of this rank's slabs, in the order of ``share.send_slab``."""
    row = share.slab_row[share.send_slab]
    itemsize = columns.itemsize[row]
    begin = share.slab_begin[share.send_slab] // itemsize
    end = share.slab_end[share.send_slab] // itemsize
    boxes = (columns.chunk_sizes[row], share.send_within, share.send_lengths)
    first, last = elements_before(*boxes, begin), elements_before(*boxes, end)
    for values in zip(
        share.send_slab.tolist(),
        share.send_to.tolist(),
        share.send_row.tolist(),
        first.tolist(),
        last.tolist(),
        begin.tolist(),
        share.send_within.tolist(),
        share.send_lengths.tolist(),
        (last - first == end - begin).tolist(),
        strict=True,
    ):
        yield Piece(*values)


def _taken(columns: LoadColumns, rows: I64) -> LoadColumns:
    """The rows of ``columns``, in this order."""
    return replace(
        columns,
        tensor=columns.tensor[rows],
        ndims=columns.ndims[rows],
        itemsize=columns.itemsize[rows],
        file=columns.file[rows],
        chunk_start=columns.chunk_start[rows],
        chunk_offsets=columns.chunk_offsets[rows],
        chunk_sizes=columns.chunk_sizes[rows],
        within=columns.within[rows],
        lengths=columns.lengths[rows],
        dest=columns.dest[rows],
        dest_within=columns.dest_within[rows],
        flat=None if columns.flat is None else columns.flat[rows],
    )


def _joined(one: LoadColumns, two: LoadColumns) -> LoadColumns:
    """Rows of both, which have the same names, by file and position of the chunk."""
    if not len(two.file):
        return one
    none = np.zeros(len(one.file), np.bool_)
    both = LoadColumns(
        names=one.names,
        flat=np.concatenate([none if one.flat is None else one.flat, _flat_of(two)]),
        **{
            name: np.concatenate([getattr(one, name), getattr(two, name)])
            for name in (
                "tensor",
                "ndims",
                "itemsize",
                "file",
                "chunk_start",
                "chunk_offsets",
                "chunk_sizes",
                "within",
                "lengths",
                "dest",
                "dest_within",
            )
        },
    )
    return _taken(both, np.lexsort((both.chunk_start, both.file)))


def _flat_of(columns: LoadColumns) -> npt.NDArray[np.bool_]:
    return np.zeros(len(columns.file), np.bool_) if columns.flat is None else columns.flat


def _narrowed(box: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for d, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        if length != box.shape[d]:
            box = box.narrow(d, offset, length)
    return box


def aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
