"""The part of a manifest that lists tensors and their chunks, as far as somebody asks for them.

Belongs here: reading that section (its layout: ``tensor_encoding``). Does not belong here: what the
chunks mean (``stored``, ``tiling``) and the rest of the manifest (``manifest_codec``).

Tables stay undecoded JSON until their tensor is asked for, by itself or with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.format.chunk_tables import MAX_DIMENSIONS, MAX_TABLE_BYTES, batches, decode_tables
from dcp_engine.format.dtypes import DTypeInfo, by_name
from dcp_engine.format.json_columns import (
    Column,
    decode_as,
    expand_column,
    object_fields,
    read,
    refuse,
)
from dcp_engine.format.names import MAX_RANKS
from dcp_engine.format.stored import (
    MAX_BYTES,
    MAX_CHUNK_CELLS,
    MAX_NDIM,
    DataFile,
    StoredChunks,
    StoredTensor,
)

__all__ = [
    "TensorSectionReader",
    "TiledTensors",
    "WholeTensors",
]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
A = TypeVar("A", bound=npt.NDArray[Any])

_table_decoder = msgspec.json.Decoder(list[Column])

_FIELDS = frozenset(
    (
        "names", "dtypes", "ndims", "shapes", "owners", "aliases",
        "file", "start", "table_rows", "tables",
    )
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeTensors:
    """n tensors that are one chunk each, no aliases, checked as ``TensorSectionReader.tensor`` and
    ``StoredTensor.chunks`` check one."""

    at: I64
    """(n,) which of the rows that were asked for, ascending."""
    dtypes: I64
    """(n,) codes of ``format.dtypes``."""
    ndims: I64
    shapes: I64
    """(n, D) padded with 1."""
    file: I32
    """(n,) rows of the data files."""
    start: I64
    """(n,) behind the begin of the file's data section."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TiledTensors:
    """n tensors and their C chunks, no aliases, checked as ``TensorSectionReader.tensor`` and
    ``StoredTensor.chunks`` check one."""

    at: I64
    """(n,) which of the rows that were asked for, ascending."""
    dtypes: I64
    """(n,) codes of ``format.dtypes``."""
    ndims: I64
    shapes: I64
    """(n, D) padded with 1."""
    counts: I64
    """(n,) chunks of each tensor; one tensor's lie behind the other's."""
    offsets: I64
    """(C, D) padded with 0."""
    sizes: I64
    """(C, D) padded with 1."""
    file: I32
    start: I64


class TensorSectionReader:
    """An encoded section, decoded as far as it was asked for.

    Construction checks names, dtypes, the number of rows of every column and references between
    rows; shapes and tables are checked when their tensor is asked for. ``complete`` is false
    for one rank's manifest of several, in which chunks need not tile their tensors.
    """

    def __init__(
        self, data: bytes | msgspec.Raw, files: Sequence[DataFile], *, complete: bool
    ) -> None:
        fields = object_fields(data, "tensors")
        missing = _FIELDS - fields.keys()
        if missing:
            refuse(f"tensors: field {min(missing)!r} is missing")
        self.names: list[str] = decode_as(list[str], fields["names"], "tensors.names")
        self._complete = complete
        self._infos = self._read_dtypes(fields)
        self._codes = np.fromiter([entry.code for entry in self._infos], np.int64)
        self._itemsizes = np.fromiter([entry.itemsize for entry in self._infos], np.int64)
        self._read_shapes(fields)
        count = len(self.names)
        self.owners: list[int] = (_column(fields, "owners", count, MAX_RANKS + 1) - 1).tolist()
        aliases = _column(fields, "aliases", count, count + 1) - 1
        self._aliases = aliases
        self._data_sizes = np.array([f.size - f.data_start for f in files], np.int64)
        self._read_places(fields, aliases)

    def __len__(self) -> int:
        return len(self.names)

    def tensor(self, row: int) -> StoredTensor:
        """The tensor of ``row``. Raises ``DamagedCheckpointError`` for an absurd shape, and for
        an alias of something else than a tensor of the same dtype, shape and owner."""
        shape = self._shape(row)
        alias = int(self._aliases[row])
        if alias >= 0 and (
            self._aliases[alias] >= 0
            or self._infos[alias] is not self._infos[row]
            or self.owners[alias] != self.owners[row]
            or self._shape(alias) != shape
        ):
            refuse(
                f"it is an alias of {self.names[alias]!r}, which differs", tensor=self.names[row]
            )
        return StoredTensor(
            name=self.names[row],
            info=self._infos[row],
            shape=shape,
            owner=self.owners[row],
            alias_of=self.names[alias] if alias >= 0 else None,
            load_chunks=self._loader(alias if alias >= 0 else row),
            must_tile=self._complete and alias < 0 and bool(self._place[row] < 0),
        )

    def whole(self, rows: I64) -> WholeTensors:
        """Those of ``rows`` (negative: none) that are one chunk each by construction and pass all
        checks; about the others ``tensor`` has to be asked. There may be a hundred thousand."""
        at = np.flatnonzero(rows >= 0)
        at = at[(self._aliases[rows[at]] < 0) & (self._place[rows[at]] >= 0)]
        row = rows[at]
        ndims, shapes = self._shapes_of(row)
        nbytes, absurd = self._bytes_of(row, shapes)
        place = self._place[row]
        file, start = self._whole_file[place], self._whole_start[place]
        room = self._data_sizes[file] - start
        fits = np.flatnonzero(~absurd & (nbytes <= np.minimum(room, MAX_BYTES)))
        return WholeTensors(
            at=at[fits],
            dtypes=self._codes[row[fits]],
            ndims=ndims[fits],
            shapes=shapes[fits],
            file=file[fits],
            start=start[fits],
        )

    def tiled(self, rows: I64) -> Iterator[TiledTensors]:
        """Those of ``rows`` (negative: none) that have a short table of chunks, or are one chunk,
        and pass all checks; about the others ``tensor`` has to be asked. In parts of bounded size,
        decoded as they are asked for."""
        if not self._complete:
            return
        whole = self.whole(rows)
        if len(whole.at):
            yield TiledTensors(
                at=whole.at,
                dtypes=whole.dtypes,
                ndims=whole.ndims,
                shapes=whole.shapes,
                counts=np.ones(len(whole.at), np.int64),
                offsets=np.zeros_like(whole.shapes),
                sizes=whole.shapes,
                file=whole.file,
                start=whole.start,
            )
        at = np.flatnonzero(rows >= 0)
        at = at[(self._aliases[rows[at]] < 0) & (self._place[rows[at]] < 0)]
        ndims = self._shape_ends[rows[at]] - self._shape_begins[rows[at]]
        at = at[(ndims > 0) & (ndims <= MAX_DIMENSIONS)]
        places = (-1 - self._place[rows[at]]).tolist()
        short = [len(memoryview(self._tables[place])) <= MAX_TABLE_BYTES for place in places]
        at = at[np.array(short, np.bool_)]
        tables = [self._tables[place] for place in (-1 - self._place[rows[at]]).tolist()]
        for begin, end in batches(tables):
            found = self._decode_together(rows, at[begin:end], tables[begin:end])
            if found is not None:
                yield found

    def _decode_together(
        self, rows: I64, at: I64, tables: Sequence[msgspec.Raw]
    ) -> TiledTensors | None:
        row = rows[at]
        ndims, shapes = self._shapes_of(row)
        nbytes, absurd = self._bytes_of(row, shapes)
        if (absurd | (nbytes > MAX_BYTES)).any():
            return None
        found = decode_tables(
            tables,
            ndims=ndims,
            shapes=shapes,
            itemsizes=self._itemsizes[row],
            data_sizes=self._data_sizes,
        )
        if found is None:
            return None
        kept = found.table
        return TiledTensors(
            at=at[kept],
            dtypes=self._codes[row[kept]],
            ndims=ndims[kept],
            shapes=shapes[kept],
            counts=found.counts,
            offsets=found.offsets,
            sizes=found.sizes,
            file=found.file.astype(np.int32),
            start=found.start,
        )

    def _shapes_of(self, row: I64) -> tuple[I64, I64]:
        """(n,) numbers of dimensions and (n, D) shapes, padded with 1."""
        ndims = self._shape_ends[row] - self._shape_begins[row]
        counted = np.arange(int(ndims.max(initial=1))) < ndims[:, None]
        shapes = np.ones(counted.shape, np.int64)
        cells = self._shape_begins[row][:, None] + np.arange(counted.shape[1])
        shapes[counted] = self._sizes[cells[counted]]
        return ndims, shapes

    def _bytes_of(self, row: I64, shapes: I64) -> tuple[I64, npt.NDArray[np.bool_]]:
        """(n,) bytes, and which of them are so many that they may have wrapped."""
        nbytes = self._itemsizes[row].copy()
        about = nbytes.astype(np.float64)
        for size in shapes.T:
            nbytes *= size
            about *= size
        return nbytes, about > 2 * MAX_BYTES

    def _read_dtypes(self, fields: Mapping[str, msgspec.Raw]) -> list[DTypeInfo]:
        names = decode_as(str | list[str], fields["dtypes"], "tensors.dtypes")
        if isinstance(names, str):
            return [by_name(names)] * len(self.names)
        if len(names) != len(self.names):
            refuse(f"tensors.dtypes: {len(names)} values for {len(self.names)} rows")
        known = {name: by_name(name) for name in set(names)}
        return [known[name] for name in names]

    def _read_shapes(self, fields: Mapping[str, msgspec.Raw]) -> None:
        ndims = _column(fields, "ndims", len(self.names), MAX_NDIM + 1)
        ends = np.cumsum(ndims)
        self._shape_ends = ends
        self._shape_begins = ends - ndims
        self._sizes = _integers(fields, "shapes", MAX_BYTES + 1)
        if len(self._sizes) != int(ndims.sum()):
            refuse(f"tensors.shapes: {len(self._sizes)} sizes for {int(ndims.sum())} dimensions")

    def _shape(self, row: int) -> tuple[int, ...]:
        shape = tuple(self._sizes[self._shape_begins[row] : self._shape_ends[row]].tolist())
        if math.prod(shape) * self._infos[row].itemsize > MAX_BYTES:
            refuse(f"shape {list(shape)} is absurdly large", tensor=self.names[row])
        return shape

    def _read_places(self, fields: Mapping[str, msgspec.Raw], aliases: I64) -> None:
        """Where each row's chunks are: in the two columns of whole tensors, or in a table."""
        count = len(self.names)
        table_rows = _integers(fields, "table_rows", count)
        self._tables: list[msgspec.Raw] = decode_as(
            list[msgspec.Raw], fields["tables"], "tensors.tables"
        )
        if len(self._tables) != len(table_rows) or (np.diff(table_rows) <= 0).any():
            refuse("tensors.table_rows: not one ascending row for each table")
        is_whole = aliases < 0
        if not is_whole[table_rows].all():
            refuse("tensors.table_rows: an alias has chunks of its own")
        is_whole[table_rows] = False
        whole_rows = np.flatnonzero(is_whole)
        place = np.zeros(count, np.int64)
        place[whole_rows] = np.arange(len(whole_rows))
        place[table_rows] = -1 - np.arange(len(table_rows))
        self._place = place
        self._whole_start = _read_only(_integers(fields, "start", MAX_BYTES + 1))
        if len(self._whole_start) != len(whole_rows):
            refuse(f"tensors.start: {len(self._whole_start)} values for {len(whole_rows)} tensors")
        file = _column(fields, "file", len(whole_rows), len(self._data_sizes))
        self._whole_file = _read_only(file.astype(np.int32))

    def _loader(self, row: int) -> Callable[[], StoredChunks]:
        place = int(self._place[row])
        if place >= 0:
            return partial(self._whole_chunk, row, place)
        return partial(self._table_chunks, row, -1 - place)

    def _whole_chunk(self, row: int, place: int) -> StoredChunks:
        shape = self._shape(row)
        start = self._whole_start[place : place + 1]
        file = self._whole_file[place : place + 1]
        nbytes = math.prod(shape) * self._infos[row].itemsize
        if int(start[0]) + nbytes > self._data_sizes[int(file[0])]:
            self._refuse_behind_file(row)
        return StoredChunks(
            offsets=_read_only(np.zeros((1, len(shape)), np.int64)),
            sizes=_read_only(np.array((shape,), np.int64)),
            file=file,
            start=start,
            nbytes=_read_only(np.array((nbytes,), np.int64)),
        )

    def _table_chunks(self, row: int, table: int) -> StoredChunks:
        offsets, sizes, file, start = self._read_table(table, row, self._shape(row))
        # Boxes inside a shape of at most MAX_BYTES: neither product nor sum can wrap.
        nbytes = sizes.prod(axis=1, dtype=np.int64) * self._infos[row].itemsize
        if (start + nbytes > self._data_sizes[file]).any():
            self._refuse_behind_file(row)
        return StoredChunks(
            offsets=_read_only(offsets),
            sizes=_read_only(sizes),
            file=_read_only(file),
            start=_read_only(start),
            nbytes=_read_only(nbytes),
        )

    def _refuse_behind_file(self, row: int) -> NoReturn:
        refuse("a chunk ends behind its file", kind="chunk_out_of_bounds", tensor=self.names[row])

    def _read_table(
        self, table: int, row: int, shape: tuple[int, ...]
    ) -> tuple[I64, I64, I32, I64]:
        what = f"chunks of {self.names[row]!r}"
        columns = read(what, lambda: _table_decoder.decode(self._tables[table]))
        ndim = len(shape)
        # A minor version may add columns behind these.
        if len(columns) < 2 * ndim + 2:
            refuse(f"{what}: {len(columns)} columns for {ndim} dimensions")
        start_column = columns[2 * ndim + 1]
        if not isinstance(start_column, list):
            refuse(f"{what}: the positions are not a list")
        count = len(start_column)
        if count * max(ndim, 1) > MAX_CHUNK_CELLS:
            refuse(f"{what}: {count} chunks are too many")
        start = expand_column(start_column, count, MAX_BYTES + 1, what)
        file = expand_column(columns[2 * ndim], count, len(self._data_sizes), what)
        offsets, sizes = np.empty((count, ndim), np.int64), np.empty((count, ndim), np.int64)
        for d, size in enumerate(shape):
            offsets[:, d] = expand_column(columns[d], count, MAX_BYTES + 1, what)
            sizes[:, d] = expand_column(columns[ndim + d], count, MAX_BYTES + 1, what)
            if (offsets[:, d] + sizes[:, d] > size).any():
                refuse(
                    "a chunk reaches outside its tensor",
                    kind="chunk_out_of_bounds",
                    tensor=self.names[row],
                )
        return offsets, sizes, file.astype(np.int32), start


def _column(fields: Mapping[str, msgspec.Raw], name: str, rows: int, limit: int) -> I64:
    values = decode_as(Column, fields[name], f"tensors.{name}")
    return expand_column(values, rows, limit, f"tensors.{name}")


def _integers(fields: Mapping[str, msgspec.Raw], name: str, limit: int) -> I64:
    values = decode_as(list[int], fields[name], f"tensors.{name}")
    return expand_column(values, len(values), limit, f"tensors.{name}")


def _read_only(array: A) -> A:
    array.setflags(write=False)
    return array
