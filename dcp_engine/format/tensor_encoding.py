"""Tensors and their chunks as the section of a manifest: columns -> JSON.

Belongs here: the layout of that section on its way out, and what must not go there. Does not belong
here: reading it (``tensor_section``) and the rest of the manifest (``manifest_codec``).

Most tensors of most checkpoints are one chunk each or have one chunk a rank. The first kind
("whole") shares two columns for all tensors; every other tensor has a table of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.errors import InvalidPlanError, UnsupportedStateError
from dcp_engine.format.dtypes import info
from dcp_engine.format.json_columns import encode_column, encode_fields, encode_list
from dcp_engine.format.stored import MAX_CHUNK_CELLS

__all__ = ["TensorSection", "encode_tensor_section"]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

_NO_ROW = -1
_encoder = msgspec.json.Encoder()


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
    fields: dict[str, bytes | Sequence[bytes]] = {
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
        "tables": tables,
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
