"""Where each written piece lies: file and byte position.

Within a file, falling element size, then plan order: so every tensor is aligned to its element,
without gaps. Belongs here: that arithmetic. Does not belong here: bytes of headers and objects
(``format``, the writer), which come before and behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.planning.arrays import stable_order
from dcp_engine.planning.columns import I32, I64, PlannedFiles, TensorTable

__all__ = ["HEADER_LIMIT", "Places", "file_order", "lay_out"]

HEADER_LIMIT = 40 << 20
"""Bytes of header entries for tensors at which a new file begins. Readers refuse headers of
100 MB, the format's own limit is 50 MB; objects need room too."""

_ELEMENT_CLASSES = 8
"""Element sizes are 16, 8, 4, 2 or 1; one more class per power of two, largest first."""
_CLASS_OF_SIZE = _ELEMENT_CLASSES - 1 - np.log2(np.maximum(np.arange(17), 1)).astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Where P pieces lie; the same rows as what was asked for."""

    file: I32
    start: I64
    files: PlannedFiles


def lay_out(
    tensors: TensorTable,
    tensor: I32,
    rank: I32,
    nbytes: I64,
    itemsize: I64,
    *,
    files_per_rank: int = 1,
) -> Places:
    """Give each piece its file and position.

    Args:
        tensor: (P,) row of ``tensors``.
        rank: (P,) who writes it.
        nbytes, itemsize: (P,) bytes of the piece and of one of its elements.
        files_per_rank: split a rank's data over as many files by bytes.
    """
    order = file_order(rank, itemsize)
    entries = _header_bytes(tensors).take(tensor)
    long = len(rank) > 0 and np.bincount(rank, weights=entries).max() >= HEADER_LIMIT
    rank, nbytes = rank.take(order), nbytes.take(order)
    begins = _changes(rank)
    if files_per_rank > 1:
        start, total = _within_runs(rank, nbytes)
        # The middle of a piece decides, so that a border goes to the side that has more of it.
        share = ((start + nbytes / 2) * files_per_rank / np.maximum(total, 1)).astype(np.int64)
        begins |= _changes(np.minimum(share, files_per_rank - 1))
    if long:
        header, _ = _within_runs(rank, entries.take(order))
        begins |= _changes(header // HEADER_LIMIT)
    file = np.cumsum(begins, dtype=np.int32) - np.int32(1)
    first = np.flatnonzero(begins)
    file_rank = rank.take(first)
    new_rank = np.flatnonzero(_changes(file_rank))
    per_rank = np.diff(np.append(new_rank, len(first)))
    number = np.arange(len(first)) - np.repeat(new_rank, per_rank)
    file_start, _ = _within_runs(file, nbytes)
    placed_file = np.empty(len(order), dtype=np.int32)
    placed_start = np.empty(len(order), dtype=np.int64)
    placed_file[order], placed_start[order] = file, file_start
    return Places(
        file=placed_file,
        start=placed_start,
        files=PlannedFiles(
            rank=file_rank,
            number=number.astype(np.int32),
            data_bytes=np.add.reduceat(nbytes, first) if len(first) else nbytes[:0],
            chunks=np.diff(np.append(first, len(order))),
        ),
    )


def file_order(group: npt.NDArray[np.integer], itemsize: I64) -> npt.NDArray[np.intp]:
    """The order of pieces in files: by ``group`` (rank or file), falling ``itemsize``, plan."""
    return stable_order(group * np.int64(_ELEMENT_CLASSES) + _CLASS_OF_SIZE.take(itemsize))


def _changes(values: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """(N,) whether a value differs from the one before it; true for the first."""
    result = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=result[1:])
    return result


def _within_runs(runs: npt.NDArray[np.integer], amounts: I64) -> tuple[I64, I64]:
    """For each row, what came before it in its run of equal ``runs``, and the run's total."""
    ends = np.cumsum(amounts)
    begin = np.flatnonzero(_changes(runs))
    lengths = np.diff(np.append(begin, len(runs)))
    before = (ends - amounts).take(begin)
    totals = ends.take(begin + lengths - 1) - before
    return ends - amounts - np.repeat(before, lengths), np.repeat(totals, lengths)


def _header_bytes(tensors: TensorTable) -> I64:
    """(K,) an upper bound of one chunk's entry in a header: name with offsets, shape, positions."""
    names: Sequence[str] = tensors.names
    lengths = np.fromiter(
        (len(msgspec.json.encode(name)) for name in names), dtype=np.int64, count=len(names)
    )
    return lengths + 2 * 20 * (tensors.ndims.astype(np.int64) + 1) + 2 * 20 + 64
