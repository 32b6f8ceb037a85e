"""What ranks need of stored chunks, and which chunks several of them need.

Belongs here: one rank's part in a form that others can use, and the table of all ranks' parts. Does
not belong here: who reads what (``shared_slabs``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from dcp_engine.planning.arrays import pad_columns, row_products, segment_positions
from dcp_engine.planning.columns import LoadColumns

__all__ = ["InterestTable", "Interests", "interests_of", "most_rows", "needed_bytes", "of_several"]

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


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


@dataclass(frozen=True, kw_only=True, eq=False)
class InterestTable:
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
    def of(interests: Sequence[Interests]) -> InterestTable:
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
        return InterestTable(
            rank=rank[order],
            row=row[order],
            chunk=np.cumsum(new) - 1,
            nbytes=row_products(sizes) * itemsize,
            itemsize=itemsize,
            chunk_sizes=sizes,
            within=within[order],
            lengths=lengths[order],
        )

    def take(self, rows: Bool) -> InterestTable:
        return InterestTable(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def needed_bytes(table: InterestTable, world_size: int) -> F64:
    """(N,) bytes that each rank needs."""
    nbytes = row_products(table.lengths) * table.itemsize
    return np.bincount(table.rank, nbytes, world_size).astype(np.float64)


def most_rows(table: InterestTable) -> int:
    """The most boxes that one rank wants of one chunk: it gets a slab once for each, at worst."""
    new = np.ones(len(table.rank), np.bool_)
    new[1:] = (np.diff(table.chunk) != 0) | (np.diff(table.rank) != 0)
    return int(np.bincount(np.cumsum(new)).max(initial=1))


def of_several(table: InterestTable, block_size: int) -> InterestTable:
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
