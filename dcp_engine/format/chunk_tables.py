"""Many tensors' chunk tables decoded, expanded and checked all at once.

Belongs here: the fast way for the tables that nearly all are: short, and right. Does not belong
here: saying what is wrong with one (``tensor_section``, which looks at a table by itself); what
does not pass here is left out, and asked for there.

A table by itself takes 50 us, whatever its length: a dozen small arrays and as many checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.format.json_columns import Column, parse_progression
from dcp_engine.format.stored import MAX_BYTES
from dcp_engine.format.tiling import slabs_in_order

__all__ = ["MAX_DIMENSIONS", "MAX_TABLE_BYTES", "TableColumns", "batches", "decode_tables"]

I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

MAX_TABLE_BYTES = 4096
"""Of JSON. Longer tables, of some hundred chunks, are worth a look each."""
MAX_DIMENSIONS = 8
"""More have other tables, so that none is padded to torch's 64."""
BATCH_BYTES = 256 << 10
"""Of JSON decoded at once: at most 16 MiB of columns, whatever is written there."""

_decoder = msgspec.json.Decoder(list[list[Column]])


@dataclass(frozen=True, kw_only=True, eq=False)
class TableColumns:
    """The C chunks of n tensors, one tensor's behind the other's, in bounds of tensor and file,
    and tiling each tensor exactly."""

    table: I64
    """(n,) which of the tables, ascending."""
    counts: I64
    """(n,) chunks of each."""
    offsets: I64
    """(C, D) padded with 0."""
    sizes: I64
    """(C, D) padded with 1."""
    file: I64
    start: I64


def batches(tables: Sequence[msgspec.Raw]) -> Iterator[tuple[int, int]]:
    """Begins and ends of stretches of ``tables`` that are decoded together."""
    begin, held = 0, 0
    for row, table in enumerate(tables):
        if held > BATCH_BYTES:
            yield begin, row
            begin, held = row, 0
        held += len(memoryview(table))
    if begin < len(tables):
        yield begin, len(tables)


def decode_tables(
    tables: Sequence[msgspec.Raw], *, ndims: I64, shapes: I64, itemsizes: I64, data_sizes: I64
) -> TableColumns | None:
    """The tables that pass every check; None if they cannot even be decoded together.

    Args:
        tables: (n,) of at most ``MAX_TABLE_BYTES`` each.
        ndims: (n,) from 1 to ``MAX_DIMENSIONS``.
        shapes: (n, D) padded with 1; no tensor has more than ``MAX_BYTES`` bytes.
        itemsizes: (n,) bytes of an element.
        data_sizes: bytes of each data file behind its header.
    """
    try:
        decoded = _decoder.decode(b"[" + b",".join(map(bytes, tables)) + b"]")
        table, counts, columns = _columns(decoded, ndims, shapes.shape[1])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, OverflowError):
        return None
    width = shapes.shape[1]
    offsets = np.ascontiguousarray(columns[:width].T)
    sizes = np.ascontiguousarray(columns[width : 2 * width].T)
    file, start = columns[2 * width], columns[2 * width + 1]
    of = np.repeat(np.arange(len(table)), counts)
    shapes, itemsizes = shapes[table], itemsizes[table]
    good = (file >= 0) & (file < len(data_sizes)) & (start >= 0) & (start <= MAX_BYTES)
    nbytes = itemsizes[of]
    for offset, size, extent in zip(offsets.T, sizes.T, shapes.T, strict=True):
        limit = extent[of]
        good &= (offset >= 0) & (size > 0) & (size <= limit) & (offset <= limit - size)
        nbytes *= size  # wraps only where it is refused
    room = np.append(data_sizes, 0)[np.where(good, file, -1)]
    good &= nbytes <= room - np.where(good, start, 0)
    passed = np.bincount(of, ~good, len(table)) == 0
    passed &= slabs_in_order(shapes, counts, offsets, sizes)
    if passed.all():
        return TableColumns(
            table=table, counts=counts, offsets=offsets, sizes=sizes, file=file, start=start
        )
    rows = passed[of]
    return TableColumns(
        table=table[passed],
        counts=counts[passed],
        offsets=offsets[rows],
        sizes=sizes[rows],
        file=file[rows],
        start=start[rows],
    )


def _columns(decoded: list[list[Column]], ndims: I64, width: int) -> tuple[I64, I64, I64]:
    """Tables of the right form: which, how many chunks each, and (2 * width + 2, C) columns."""
    if len(decoded) != len(ndims):
        raise ValueError("a table is more than one value")
    kept: list[int] = []
    counts: list[int] = []
    columns: list[list[int]] = [[] for _ in range(2 * width + 2)]
    # By dimensions, which column of a table goes where; padding where there is none.
    places = {
        ndim: [*range(ndim), *range(width, width + ndim), 2 * width, 2 * width + 1]
        for ndim in np.unique(ndims).tolist()
    }
    padding = {
        ndim: [*((d, 0) for d in range(ndim, width)), *((width + d, 1) for d in range(ndim, width))]
        for ndim in places
    }
    for row, (table, ndim) in enumerate(zip(decoded, ndims.tolist(), strict=True)):
        used = 2 * ndim + 2
        start = table[used - 1] if len(table) >= used else None
        if type(start) is not list or not start:
            continue
        count = len(start)
        values: list[Sequence[int]] = []
        for column in table[:used]:
            if type(column) is int:
                values.append([column] * count)
            elif type(column) is list and len(column) == count:
                values.append(column)
            elif type(column) is str and count > 1 and (run := parse_progression(column)):
                first, step = run
                values.append(range(first, first + step * count, step))
            else:
                break
        if len(values) < used:
            continue
        kept.append(row)
        counts.append(count)
        for place, value in zip(places[ndim], values, strict=True):
            columns[place] += value
        for place, fill in padding[ndim]:
            columns[place] += [fill] * count
    total = len(columns[-1])
    joined = np.empty((len(columns), total), np.int64)
    for place, column in enumerate(columns):
        joined[place] = np.fromiter(column, np.int64, total)
    return np.array(kept, np.int64), np.array(counts, np.int64), joined
