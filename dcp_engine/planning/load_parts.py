"""Overlaps of what is wanted with what is stored, collected and put in the order of their bytes.

Belongs here: which parts of one tensor's chunks its wanted boxes are, and two chunks that claim the
same bytes. Does not belong here: which tensors are wanted (``load_plan``), and finding the overlaps
of many tensors (``load_together``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.errors import DamagedCheckpointError
from dcp_engine.format.manifest import StoredTensor
from dcp_engine.format.stored import StoredChunks
from dcp_engine.format.tensor_section import TiledTensors
from dcp_engine.geometry.boxes import find_overlaps
from dcp_engine.planning.arrays import pad_columns, row_products
from dcp_engine.planning.columns import I32, I64, LoadColumns
from dcp_engine.state.values import Box

__all__ = ["LoadParts", "Overlaps", "cut_overlaps", "uncovered"]

_FEW_PAIRS = 16
"""Up to so many pairs of a wanted and a stored box Python is done before numpy has begun."""
_FEW_BOXES = 8
"""Up to so many wanted boxes of a tensor are compared with all its chunks one by one, which is
faster than any index."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlaps:
    """P pairs of a wanted box and a stored chunk, and what they share. D is at least the number
    of dimensions; the rest is padding."""

    file: I32
    start: I64
    """(P,) of the chunk."""
    chunk_offsets: I64
    """(P, D)"""
    chunk_sizes: I64
    within: I64
    """(P, D) where the shared box begins in the chunk."""
    lengths: I64
    dest_within: I64
    """(P, D) where it begins in the wanted box."""


def cut_overlaps(
    pairs: tuple[I64, I64], offsets: I64, sizes: I64, chunks: StoredChunks | TiledTensors
) -> Overlaps:
    """What ``pairs`` (rows of the boxes ``offsets, sizes``, rows of ``chunks``) share."""
    box, chunk = pairs
    chunk_offsets = chunks.offsets.take(chunk, axis=0)
    chunk_sizes = chunks.sizes.take(chunk, axis=0)
    own = offsets.take(box, axis=0)
    begin = np.maximum(own, chunk_offsets)
    end = np.minimum(own + sizes.take(box, axis=0), chunk_offsets + chunk_sizes)
    return Overlaps(
        file=chunks.file.take(chunk),
        start=chunks.start.take(chunk),
        chunk_offsets=chunk_offsets,
        chunk_sizes=chunk_sizes,
        within=begin - chunk_offsets,
        lengths=end - begin,
        dest_within=begin - own,
    )


_BOX_COLUMNS = (
    ("chunk_offsets", 0),
    ("chunk_sizes", 1),
    ("within", 0),
    ("lengths", 1),
    ("dest_within", 0),
)
"""Columns of ``Overlaps``, and what they are padded with."""


def uncovered(box: I64, overlaps: Overlaps, sizes: I64) -> npt.NDArray[np.bool_]:
    """(W,) which of the wanted boxes of ``sizes`` are not just what ``overlaps`` (of the boxes
    ``box``, (P,)) share with them."""
    covered = np.bincount(box, weights=row_products(overlaps.lengths), minlength=len(sizes))
    differ: npt.NDArray[np.bool_] = covered != row_products(sizes)
    return differ


class LoadParts:
    """Overlaps, collected."""

    def __init__(self) -> None:
        self.destinations: list[torch.Tensor] = []
        self._names: list[str] = []
        self._ndims: list[int] = []
        self._itemsizes: list[int] = []
        self._counts: list[int] = []
        self._shared: list[bool] = []
        self._overlaps: list[Overlaps] = []
        self._dest: list[I64] = []

    def add(self, stored: StoredTensor, boxes: Sequence[Box], *, first: int) -> None:
        """Read ``boxes`` of ``stored`` into the destinations from row ``first`` on."""
        if not boxes:
            return
        chunks = stored.chunks
        ndim = len(stored.shape)
        offsets = np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), ndim)
        sizes = np.array([box.sizes for box in boxes], np.int64).reshape(len(boxes), ndim)
        pairs = _overlaps(offsets, sizes, chunks.offsets, chunks.sizes)
        overlaps = cut_overlaps(pairs, offsets, sizes, chunks)
        short = np.flatnonzero(uncovered(pairs[0], overlaps, sizes))
        if len(short):
            lost = boxes[int(short[0])]
            raise DamagedCheckpointError(
                f"the stored chunks do not cover the box at {list(lost.offsets)} of sizes "
                f"{list(lost.sizes)} exactly once",
                tensor=stored.name,
            )
        self.add_overlaps(
            [stored.name],
            [ndim],
            [stored.info.itemsize],
            [len(pairs[0])],
            pairs[0] + first,
            overlaps,
            shared=stored.alias_of is not None or stored.shares_bytes,
        )

    def add_overlaps(
        self,
        names: Sequence[str],
        ndims: Sequence[int],
        itemsizes: Sequence[int],
        counts: Sequence[int],
        dest: I64,
        overlaps: Overlaps,
        *,
        shared: bool = False,
    ) -> None:
        """What is read of several tensors.

        Args:
            names, ndims, itemsizes: of the tensors.
            counts: how many of ``overlaps`` are of each.
            dest: (P,) row of the destination each is for.
            shared: the tensors may claim the same bytes as others.
        """
        self._names += names
        self._ndims += ndims
        self._itemsizes += itemsizes
        self._counts += counts
        self._shared += [shared] * len(names)
        self._dest.append(dest)
        self._overlaps.append(overlaps)

    def columns(self) -> LoadColumns:
        """All of it, by file and position."""
        width = max([1, *self._ndims])
        parts, none = self._overlaps, np.zeros((0, width), np.int64)
        chunk_offsets, chunk_sizes, within, lengths, dest_within = (
            np.concatenate(
                [none, *(pad_columns(getattr(v, name)[:, :width], width, fill) for v in parts)]
            )
            for name, fill in _BOX_COLUMNS
        )
        file = np.concatenate([np.zeros(0, np.int32), *(part.file for part in parts)])
        start = np.concatenate([np.zeros(0, np.int64), *(part.start for part in parts)])
        itemsize = np.repeat(np.array(self._itemsizes, np.int64), self._counts)
        position = np.zeros(len(file), np.int64)
        for d in range(width):
            position = position * chunk_sizes[:, d] + within[:, d]
        order = np.lexsort((start + position * itemsize, file))
        rows = np.repeat(np.arange(len(self._names), dtype=np.int32), self._counts)
        columns = LoadColumns(
            names=tuple(self._names),
            tensor=rows.take(order),
            ndims=np.repeat(np.array(self._ndims, np.uint8), self._counts).take(order),
            itemsize=itemsize.take(order),
            file=file.take(order),
            chunk_start=start.take(order),
            chunk_offsets=chunk_offsets.take(order, axis=0),
            chunk_sizes=chunk_sizes.take(order, axis=0),
            within=within.take(order, axis=0),
            lengths=lengths.take(order, axis=0),
            dest=np.concatenate([np.zeros(0, np.int64), *self._dest]).take(order).astype(np.int32),
            dest_within=dest_within.take(order, axis=0),
        )
        _refuse_shared_bytes(columns, np.array(self._shared, np.bool_))
        return columns


def _refuse_shared_bytes(columns: LoadColumns, shared: npt.NDArray[np.bool_]) -> None:
    """Raise if two chunks that are read claim the same bytes; ``shared`` tensors may.

    By position of what is read, chunks that do not overlap follow each other whole, so that
    neighbours tell.
    """
    rows = np.flatnonzero(~shared[columns.tensor])
    file, start = columns.file.take(rows), columns.chunk_start.take(rows)
    tensor = columns.tensor.take(rows)
    offsets = columns.chunk_offsets.take(rows, axis=0)
    end = start + row_products(columns.chunk_sizes.take(rows, axis=0)) * columns.itemsize.take(rows)
    same = (
        (tensor[1:] == tensor[:-1])
        & (start[1:] == start[:-1])
        & (offsets[1:] == offsets[:-1]).all(axis=1)
    )
    clash = np.flatnonzero((file[1:] == file[:-1]) & (start[1:] < end[:-1]) & ~same)
    if len(clash):
        first = int(clash[0])
        one, two = columns.names[int(tensor[first])], columns.names[int(tensor[first + 1])]
        raise DamagedCheckpointError(
            f"chunks of {one!r} and {two!r} claim the same bytes", kind="chunks_overlap", tensor=one
        )


def _overlaps(offsets: I64, sizes: I64, stored: I64, stored_sizes: I64) -> tuple[I64, I64]:
    """Pairs (wanted row, stored row) that share an element, by wanted row."""
    if len(offsets) > _FEW_BOXES:
        return find_overlaps(offsets, sizes, stored, stored_sizes)
    if len(offsets) * len(stored) <= _FEW_PAIRS:
        return _few_overlaps(offsets, sizes, stored, stored_sizes)
    ends = stored + stored_sizes
    rows = []
    for begin, size in zip(offsets, sizes, strict=True):
        meets = np.ones(len(stored), np.bool_)
        for d in range(len(begin)):
            low = int(begin[d])
            meets &= (stored[:, d] < low + int(size[d])) & (ends[:, d] > low)
        rows.append(np.flatnonzero(meets))
    counts = [len(row) for row in rows]
    return np.repeat(np.arange(len(rows)), counts), np.concatenate(rows)


def _few_overlaps(offsets: I64, sizes: I64, stored: I64, stored_sizes: I64) -> tuple[I64, I64]:
    chunks = list(zip(stored.tolist(), stored_sizes.tolist(), strict=True))
    pairs = [
        (row, at)
        for row, (begins, extents) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True))
        for at, (others, lengths) in enumerate(chunks)
        if all(
            other < begin + extent and other + length > begin
            for begin, extent, other, length in zip(begins, extents, others, lengths, strict=True)
        )
    ]
    columns = np.array(pairs, np.int64).reshape(len(pairs), 2)
    return columns[:, 0], columns[:, 1]
