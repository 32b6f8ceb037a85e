"""The part of a manifest that lists tensors and their chunks: columns <-> JSON.

Belongs here: the layout of that section, both ways. Does not belong here: what the chunks mean
(``stored``, ``tiling``) and the rest of the manifest (``manifest_codec``).

Most tensors of most checkpoints are one chunk each or have one chunk a rank. The first kind
("whole") shares two columns for all tensors; every other tensor has a table of its own, which
stays undecoded JSON until the tensor is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.errors import InvalidPlanError, UnsupportedStateError
from dcp_engine.format.dtypes import DTypeInfo, by_name, info
from dcp_engine.format.json_columns import (
    Column,
    decode_as,
    encode_column,
    encode_fields,
    encode_list,
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

__all__ = ["TensorSection", "TensorSectionReader", "WholeTensors", "encode_tensor_section"]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

A = TypeVar("A", bound=npt.NDArray[Any])

_NO_ROW = -1
_encoder = msgspec.json.Encoder()
_table_decoder = msgspec.json.Decoder(list[Column])


@dataclass(frozen=True, slots=True)
class TensorSection:
    """The encoded section. Depends only on the plan, so it can be kept with it."""

    data: bytes
    chunks: int
    """Chunks in all tables."""


def encode_tensor_section(
    *,
    names: Sequence[str],
    dtypes: U8,
    ndims: U8,
    shapes: I64,
    owners: I32,
    aliases: I32,
    chunk_tensor: I32,
    chunk_offsets: I64,
    chunk_sizes: I64,
    chunk_file: I32,
    chunk_start: I64,
) -> TensorSection:
    """Encode K tensors with C chunks, as ``planning.columns`` holds them.

    ``dtypes`` (K,) codes, ``shapes`` (K, D) padded with 1, ``owners`` (K,) a rank or ``NO_OWNER``,
    ``aliases`` (K,) row of the tensor that holds the data, or negative; ``chunk_tensor`` (C,)
    ascending, ``chunk_offsets`` and ``chunk_sizes`` (C, D) padded with 0 and 1, ``chunk_file``
    (C,) row of the data files, ``chunk_start`` (C,) relative to the file's data section.
    Raises ``UnsupportedStateError`` for names that are not valid UTF-8 and for more chunks than
    ``MAX_CHUNK_CELLS`` allows, ``InvalidPlanError`` for aliases that a reader would refuse.
    """
    _check_plan(names, dtypes, ndims, shapes, owners, aliases, chunk_tensor)
    counts = np.bincount(chunk_tensor, minlength=len(names))
    ends = np.cumsum(counts)
    begins = ends - counts
    # Whole: one chunk that is the tensor. Looked at for all tensors at once.
    single = np.flatnonzero(counts == 1)
    only = begins[single]
    is_whole = (chunk_offsets[only] == 0).all(axis=1) & (chunk_sizes[only] == shapes[single]).all(
        axis=1
    )
    whole_chunks = only[is_whole]
    in_table = aliases < 0
    in_table[single[is_whole]] = False
    table_rows = np.flatnonzero(in_table)
    tables = [
        _encode_table(
            int(ndims[row]),
            chunk_offsets[begins[row] : ends[row]],
            chunk_sizes[begins[row] : ends[row]],
            chunk_file[begins[row] : ends[row]],
            chunk_start[begins[row] : ends[row]],
        )
        for row in table_rows.tolist()
    ]
    counted = np.arange(shapes.shape[1]) < ndims[:, None]
    fields = {
        "names": _encode_names(names),
        "dtypes": _encode_dtypes(dtypes),
        "ndims": encode_column(ndims.astype(np.int64)),
        "shapes": encode_list(shapes[counted]),
        # One more than the rank, so that columns hold no negative numbers.
        "owners": encode_column(owners.astype(np.int64) + 1),
        "aliases": encode_column(np.maximum(aliases, _NO_ROW).astype(np.int64) + 1),
        "file": encode_column(chunk_file[whole_chunks]),
        "start": encode_list(chunk_start[whole_chunks]),
        "table_rows": encode_list(table_rows),
        "tables": b"[" + b",".join(tables) + b"]",
    }
    return TensorSection(encode_fields(fields), len(chunk_tensor))


def _check_plan(
    names: Sequence[str],
    dtypes: U8,
    ndims: U8,
    shapes: I64,
    owners: I32,
    aliases: I32,
    chunk_tensor: I32,
) -> None:
    """What a reader would refuse is refused here, before it is a checkpoint."""
    if (np.diff(chunk_tensor) < 0).any():
        raise InvalidPlanError("chunks are not sorted by tensor")
    counts = np.bincount(chunk_tensor, minlength=len(names))
    too_many = np.flatnonzero(counts * np.maximum(ndims, 1) > MAX_CHUNK_CELLS)
    if len(too_many):
        raise UnsupportedStateError(
            f"{counts[too_many[0]]} chunks are too many", tensor=names[too_many[0]]
        )
    rows = np.flatnonzero(aliases >= 0)
    source = aliases[rows]
    wrong = (
        (counts[rows] > 0)
        | (aliases[source] >= 0)
        | (dtypes[source] != dtypes[rows])
        | (ndims[source] != ndims[rows])
        | (owners[source] != owners[rows])
        | (shapes[source] != shapes[rows]).any(axis=1)
    )
    if wrong.any():
        raise InvalidPlanError(
            "it is an alias of an alias or of another kind of tensor, or has chunks of its own",
            tensor=names[int(rows[np.argmax(wrong)])],
        )


def _encode_names(names: Sequence[str]) -> bytes:
    try:
        return _encoder.encode(list(names))
    except UnicodeEncodeError:
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise UnsupportedStateError(
                    "the key is not valid UTF-8", tensor=ascii(name)
                ) from error
        raise


def _encode_dtypes(codes: U8) -> bytes:
    by_code = {code: info(code).name for code in np.unique(codes).tolist()}
    if len(by_code) == 1:
        return _encoder.encode(next(iter(by_code.values())))
    return _encoder.encode([by_code[code] for code in codes.tolist()])


def _encode_table(ndim: int, offsets: I64, sizes: I64, file: I32, start: I64) -> bytes:
    columns = [encode_column(offsets[:, d]) for d in range(ndim)]
    columns += [encode_column(sizes[:, d]) for d in range(ndim)]
    columns += [encode_column(file), encode_list(start)]
    return b"[" + b",".join(columns) + b"]"


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
        self._data_sizes = [f.size - f.data_start for f in files]
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
        ndims = self._shape_ends[row] - self._shape_begins[row]
        counted = np.arange(int(ndims.max(initial=1))) < ndims[:, None]
        shapes = np.ones(counted.shape, np.int64)
        cells = self._shape_begins[row][:, None] + np.arange(counted.shape[1])
        shapes[counted] = self._sizes[cells[counted]]
        codes = self._codes[row]
        nbytes = self._itemsizes[row].copy()
        about = nbytes.astype(np.float64)
        for size in shapes.T:
            nbytes *= size  # may wrap; then ``about`` tells
            about *= size
        place = self._place[row]
        file, start = self._whole_file[place], self._whole_start[place]
        room = np.array(self._data_sizes, np.int64)[file] - start
        fits = np.flatnonzero((about <= 2 * MAX_BYTES) & (nbytes <= np.minimum(room, MAX_BYTES)))
        return WholeTensors(
            at=at[fits],
            dtypes=codes[fits],
            ndims=ndims[fits],
            shapes=shapes[fits],
            file=file[fits],
            start=start[fits],
        )

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
        if (start + nbytes > np.array(self._data_sizes, np.int64)[file]).any():
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
