"""Where each written piece lies: file and byte position.

Within a file, by the power of two that divides a piece's size, falling, then plan order: so every
piece is aligned to its elements, and those of whole pages to pages, without gaps. Belongs here:
that arithmetic. Does not belong here: bytes of headers and objects (``format``, the writer), which
come before and behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.planning.arrays import blocks, run_blocks, segment_positions, stable_order
from dcp_engine.planning.columns import I32, I64, PlannedFiles, TensorTable

__all__ = ["HEADER_LIMIT", "Places", "alignment_classes", "lay_out"]

HEADER_LIMIT = 40 << 20
"""Bytes of header entries for tensors at which a new file begins. Readers refuse headers of
100 MB, the format's own limit is 50 MB; objects need room too."""

_PAGE = 4096
"""More alignment is of no use to direct I/O and mapping."""
_CLASSES = 13
"""One per power of two up to a page."""
_CLASS_OF_POWER = np.zeros(_PAGE + 1, np.int8)
_CLASS_OF_POWER[1 << np.arange(_CLASSES)] = np.arange(_CLASSES)[::-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Where P pieces lie; the same rows as what was asked for."""

    file: I32
    start: I64
    order: I64
    """(P,) rows of the pieces, as they lie in the files one behind the other."""
    files: PlannedFiles


def lay_out(
    tensors: TensorTable, tensor: I32, rank: I32, nbytes: I64, *, files_per_rank: int = 1
) -> Places:
    """Give each piece its file and position.

    Args:
        tensor: (P,) row of ``tensors``.
        rank: (P,) who writes it.
        nbytes: (P,) bytes of the piece.
        files_per_rank: split a rank's data over as many files by bytes.
    """
    order = _file_order(rank, nbytes)
    by_rank = rank.take(order)
    entries = _header_bytes(tensors)
    file, start = np.empty(len(order), np.int32), np.empty(len(order), np.int64)
    ranks, sizes, counts = [by_rank[:0]], [nbytes[:0]], [order[:0]]
    known = 0
    for block in run_blocks(by_rank):  # no file has pieces of two ranks
        rows, of = order[block], by_rank[block]
        amounts = nbytes.take(rows)
        first = _first_of_files(of, amounts, entries.take(tensor.take(rows)), files_per_rank)
        lengths = _run_lengths(first, len(rows))
        file[rows] = np.repeat(np.arange(known, known + len(first)), lengths)
        start[rows] = _before_in_run(first, amounts)
        ranks.append(of.take(first))
        sizes.append(np.add.reduceat(amounts, first))
        counts.append(lengths)
        known += len(first)
    file_rank = np.concatenate(ranks)
    of_rank = _run_lengths(np.flatnonzero(_changes(file_rank)), known)
    return Places(
        file=file,
        start=start,
        order=order,
        files=PlannedFiles(
            rank=file_rank,
            number=segment_positions(of_rank).astype(np.int32),
            data_bytes=np.concatenate(sizes),
            chunks=np.concatenate(counts),
        ),
    )


def _first_of_files(
    rank: I32, nbytes: I64, entries: I64, files_per_rank: int
) -> npt.NDArray[np.intp]:
    """The rows with which files begin, of pieces in file order; ``entries`` (N,) are bytes in a
    file's header."""
    begins = _changes(rank)
    of_rank = np.flatnonzero(begins)
    if files_per_rank > 1:
        lengths = _run_lengths(of_rank, len(rank))
        total = np.repeat(np.add.reduceat(nbytes, of_rank), lengths)
        # The middle of a piece decides, so that a border goes to the side that has more of it.
        middle = _before_in_run(of_rank, nbytes) + nbytes / 2
        share = (middle * files_per_rank / np.maximum(total, 1)).astype(np.int64)
        begins |= _changes(np.minimum(share, files_per_rank - 1))
    begins |= _changes(_before_in_run(of_rank, entries) // HEADER_LIMIT)
    return np.flatnonzero(begins)


def alignment_classes(nbytes: I64) -> npt.NDArray[np.int8]:
    """(P,) 0 for sizes of whole pages, and one more for each power of two that a size has less.
    Since sizes are multiples of their element size, pieces that lie by rising class one behind the
    other, from a page on, are aligned to their elements."""
    powers = nbytes & -nbytes
    powers[(powers == 0) | (powers > _PAGE)] = _PAGE
    return _CLASS_OF_POWER.take(powers)


def _file_order(rank: I32, nbytes: I64) -> npt.NDArray[np.intp]:
    """The order of pieces in files: by rank, alignment, plan."""
    top = (int(rank.max(initial=0)) + 1) * _CLASSES
    key = np.empty(len(rank), np.min_scalar_type(top - 1))
    for block in blocks(len(rank)):
        key[block] = rank[block] * np.int64(_CLASSES) + alignment_classes(nbytes[block])
    return stable_order(key)


def _changes(values: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """(N,) whether a value differs from the one before it; true for the first."""
    result = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=result[1:])
    return result


def _run_lengths(first: npt.NDArray[np.intp], count: int) -> I64:
    """How long the runs are that begin at rows ``first`` of ``count``."""
    return np.diff(np.append(first, count))


def _before_in_run(first: npt.NDArray[np.intp], amounts: I64) -> I64:
    """For each row, what came before it in its run; runs begin at rows ``first``."""
    before: I64 = np.cumsum(amounts)
    before -= amounts
    before -= np.repeat(before.take(first), _run_lengths(first, len(amounts)))
    return before


def _header_bytes(tensors: TensorTable) -> I64:
    """(K,) an upper bound of one chunk's entry in a header: name with offsets, shape, positions."""
    names: Sequence[str] = tensors.names
    lengths = np.fromiter(
        (len(msgspec.json.encode(name)) for name in names), dtype=np.int64, count=len(names)
    )
    return lengths + 2 * 20 * (tensors.ndims.astype(np.int64) + 1) + 2 * 20 + 64
