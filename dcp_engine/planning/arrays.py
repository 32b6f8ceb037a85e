"""Small array operations that the planning modules share, each one pass over its input.

numpy reduces along a short last axis slowly (15 ms against 0.6 ms for a million rows of two), so
what goes over dimensions is a loop over columns here. What has a row per box of the whole job is
worked on in blocks, so that intermediate results stay in the processor's caches and in memory that
the process already has: fresh memory costs more than the arithmetic. Does not belong here: anything
that knows what a tensor or a rank is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

__all__ = [
    "all_rows",
    "blocks",
    "pad_columns",
    "padded_rows",
    "row_products",
    "run_blocks",
    "segment_positions",
    "segment_starts",
    "stable_order",
]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.signedinteger]

_RADIX = 1 << 16
_BLOCK = 1 << 14
"""Rows: a column of 64-bit integers takes 128 KiB. With 1 << 16, what a block leaves behind is
more than the C library keeps by default, and is faulted in anew for the next one."""


def blocks(count: int) -> Iterator[slice]:
    """``count`` rows in stretches of bounded length."""
    for begin in range(0, count, _BLOCK):
        yield slice(begin, min(begin + _BLOCK, count))


def run_blocks(keys: Ints) -> Iterator[slice]:
    """The same for sorted ``keys``, equal ones together: a block is longer where a run is. Looks
    only at keys of blocks that it has not yielded yet."""
    begin = 0
    while begin < len(keys):
        end = begin + _BLOCK
        if end < len(keys):
            end += int(np.searchsorted(keys[end:], keys[end - 1], side="right"))
        yield slice(begin, min(end, len(keys)))
        begin = end


def row_products(values: I64) -> I64:
    """(N, D) -> (N,) product of each row; 1 where D is 0."""
    result = np.ones(len(values), dtype=np.int64)
    for column in values.T:
        result *= column
    return result


def all_rows(values: Bool) -> Bool:
    """(N, D) -> (N,) whether all of a row is true."""
    result = np.ones(len(values), dtype=np.bool_)
    for column in values.T:
        result &= column
    return result


def pad_columns(values: I64, width: int, fill: int) -> I64:
    """(N, d) -> (N, width), padded on the right with ``fill``."""
    missing = width - values.shape[1]
    if missing == 0:
        return values
    padded = np.full((len(values), width), fill, dtype=np.int64)
    padded[:, : values.shape[1]] = values
    return padded


def padded_rows(rows: Sequence[tuple[int, ...]], width: int, fill: int) -> I64:
    """Tuples of at most ``width`` numbers as (N, width), padded on the right with ``fill``."""
    count = len(rows)
    lengths = np.fromiter(map(len, rows), np.int64, count)
    cells = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    if len(cells) == count * width:
        return cells.reshape(count, width)
    padded = np.full((count, width), fill, dtype=np.int64)
    padded[np.arange(width) < lengths[:, None]] = cells
    return padded


def stable_order(keys: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    """The order that sorts ``keys`` (not negative), equal ones as they came.

    A radix sort, linear in the number of keys: numpy has one for 16-bit integers only, so wider
    keys are sorted by their low halves first.
    """
    if len(keys) == 0:
        return np.zeros(0, dtype=np.intp)
    top = int(keys.max())
    order = np.argsort(keys.astype(np.uint16, copy=False), kind="stable")
    shift = 16
    while top >> shift:
        digit = ((keys >> shift) & (_RADIX - 1)).astype(np.uint16)
        order = order.take(np.argsort(digit.take(order), kind="stable"))
        shift += 16
    return order


def segment_starts(keys: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    """Where runs of equal neighbours begin."""
    if len(keys) == 0:
        return np.zeros(0, dtype=np.intp)
    return np.concatenate(([0], np.flatnonzero(keys[1:] != keys[:-1]) + 1)).astype(np.intp)


def segment_positions(counts: npt.NDArray[np.integer]) -> I64:
    """0, 1, 2, ... within each of consecutive segments of these lengths."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(counts) else 0
    positions: I64 = np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)
    return positions
