"""Headers of data files, which are safetensors files.

Belongs here: making and reading the header, the names of its entries, and how many entries fit
into one. Does not belong here: the data section, and which tensors go into which file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.errors import DamagedCheckpointError, UnsupportedStateError
from dcp_engine.format.dtypes import info, stored_shape

__all__ = [
    "DATA_ALIGNMENT",
    "MAX_HEADER_BYTES",
    "MAX_PLANNED_HEADER_BYTES",
    "EntryColumns",
    "HeaderEntry",
    "ParsedEntry",
    "ParsedHeader",
    "Stored",
    "encode_header",
    "encode_header_columns",
    "entry_name",
    "entry_names",
    "entry_size_bound",
    "parse_data_start",
    "parse_header",
    "split_by_header_limit",
]

I64 = npt.NDArray[np.int64]

DATA_ALIGNMENT = 4096
"""The data section begins on a multiple of this, for direct I/O and mapping."""
MAX_PLANNED_HEADER_BYTES = 50_000_000
"""A writer begins a new file before a header reaches this."""
MAX_HEADER_BYTES = 100_000_000
"""A reader refuses more; safetensors' own limit."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_DIGITS = 19
"""Longest decimal of a 63-bit integer."""
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor, chunk or object in a data file."""

    name: str
    """Its key in the header; see ``entry_name``."""
    dtype_code: int
    """Code of ``format.dtypes``."""
    shape: tuple[int, ...]
    """Of the chunk, as torch sees it."""
    begin: int
    """First byte, relative to the data section."""
    end: int
    """Behind the last byte."""


Stored = tuple[str, tuple[int, ...]]
"""safetensors' name of a dtype, and a shape."""


class ParsedEntry(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """An entry as the header has it. A struct: a header may have a hundred thousand."""

    dtype: str
    """safetensors' name."""
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def begin(self) -> int:
        """First byte, relative to the data section."""
        return self.data_offsets[0]

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return self.data_offsets[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class EntryColumns:
    """The n entries of a header, in the order of their bytes."""

    begins: I64
    ends: I64
    kinds: I64
    """(n,) rows of ``stored``."""
    stored: Mapping[Stored, int]
    """The different dtypes and shapes, numbered."""


@dataclass(frozen=True, slots=True)
class ParsedHeader:
    """A header that was read and checked."""

    entries: Mapping[str, ParsedEntry]
    metadata: Mapping[str, str]
    data_start: int
    """Bytes before the data section."""
    columns: EntryColumns
    """``entries`` once more, without their names."""


def entry_name(fqn: str, offsets: Sequence[int] | None, taken: AbstractSet[str]) -> str:
    """The key for a tensor (``offsets`` None) or for the chunk of it that begins at ``offsets``.

    ``taken`` holds the keys that the file has already; the caller adds the result.
    """
    name = fqn if offsets is None else f"{fqn}@{','.join(map(str, offsets))}"
    if name not in taken and name != _METADATA:
        return name
    number = 1
    while f"{name}@@{number}" in taken:
        number += 1
    return f"{name}@@{number}"


def encode_header(entries: Sequence[HeaderEntry], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a data file up to its data section: length, JSON, and spaces up to a multiple
    of ``DATA_ALIGNMENT``. ``entries`` are in the order of their bytes. Same input, same bytes.

    Raises ``UnsupportedStateError`` for a name that is not valid UTF-8.
    """
    return encode_header_columns(
        [entry.name for entry in entries],
        [entry.dtype_code for entry in entries],
        [entry.shape for entry in entries],
        [entry.begin for entry in entries],
        [entry.end for entry in entries],
        metadata,
    )


def encode_header_columns(
    names: Sequence[str],
    dtype_codes: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    begins: Sequence[int],
    ends: Sequence[int],
    metadata: Mapping[str, str],
) -> bytes:
    """``encode_header`` of columns; names are distinct, ``HeaderEntry`` says what they mean."""
    middles: dict[tuple[int, tuple[int, ...]], str] = {}
    parts = [f'"{_METADATA}":{_encode(dict(metadata)).decode()}'] if metadata else []
    for name, code, shape, begin, end in zip(
        _quoted(names), dtype_codes, shapes, begins, ends, strict=True
    ):
        middle = middles.get((code, shape))
        if middle is None:
            dtype, stored = stored_shape(info(code), shape)
            sizes = ",".join(map(str, stored))
            middle = f':{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":['
            middles[code, shape] = middle
        parts.append(f"{name}{middle}{begin},{end}]}}")
    body = b"{" + ",".join(parts).encode() + b"}"
    padded = -(-(_LENGTH_BYTES + len(body)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - _LENGTH_BYTES
    return padded.to_bytes(_LENGTH_BYTES, "little") + body.ljust(padded)


def entry_names(fqns: Sequence[str], offsets: Sequence[Sequence[int] | None]) -> list[str]:
    """``entry_name`` for all entries of one file, in order."""
    names = [
        fqn if at is None else f"{fqn}@{','.join(map(str, at))}"
        for fqn, at in zip(fqns, offsets, strict=True)
    ]
    distinct = set(names)
    if len(distinct) == len(names) and _METADATA not in distinct:
        return names
    taken: set[str] = set()
    for row, (fqn, at) in enumerate(zip(fqns, offsets, strict=True)):
        names[row] = entry_name(fqn, at, taken)
        taken.add(names[row])
    return names


def _quoted(names: Sequence[str]) -> list[str]:
    """Names as JSON strings."""
    together = "".join(names)
    if together.isascii() and together.isprintable() and not ('"' in together or "\\" in together):
        return [f'"{name}"' for name in names]
    return [_encode(name).decode() for name in names]


def _encode(value: str | dict[str, str]) -> bytes:
    try:
        return _encoder.encode(value)
    except UnicodeEncodeError as error:
        raise UnsupportedStateError(
            "the key is not valid UTF-8", tensor=ascii(value), hint="rename the key"
        ) from error


def entry_size_bound(fqn: str, ndim: int) -> int:
    """At least as many bytes as any chunk of tensor ``fqn`` takes up in a header."""
    digits = _DIGITS + 1
    # Offsets in the name, sizes and a trailing byte dimension in the shape, two data offsets,
    # a number behind the name, and the constant text around them.
    return len(_encode(fqn)) + digits * (2 * ndim + 1 + 2 + 1) + 64


def split_by_header_limit(
    bounds: npt.NDArray[np.int64], limit: int = MAX_PLANNED_HEADER_BYTES
) -> npt.NDArray[np.int32]:
    """For each entry, in order, the number (from 0) of the file it goes to so that no file's
    header reaches ``limit`` bytes. ``bounds`` (n,) are of ``entry_size_bound``."""
    room = limit - 2 * DATA_ALIGNMENT
    numbers = np.empty(len(bounds), np.int32)
    begin = number = 0
    total = np.concatenate(([0], np.cumsum(bounds)))
    while begin < len(bounds):
        end = int(np.searchsorted(total, total[begin] + room, side="right")) - 1
        end = max(end, begin + 1)
        numbers[begin:end] = number
        begin, number = end, number + 1
    return numbers


def parse_data_start(prefix: bytes, file_size: int) -> int:
    """Where the data section begins, from a file's first 8 bytes.

    Raises ``DamagedCheckpointError`` (``header_mismatch``) for an absurd length.
    """
    if len(prefix) < _LENGTH_BYTES:
        raise _invalid("the file is shorter than 8 bytes")
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_size - _LENGTH_BYTES):
        raise _invalid(f"a header of {length} bytes in a file of {file_size}")
    return _LENGTH_BYTES + length


def parse_header(prefix: bytes, file_size: int) -> ParsedHeader:
    """Read a header. ``prefix`` is the begin of the file, at least up to the data section.

    Raises ``DamagedCheckpointError`` (``header_mismatch``) unless it is a valid safetensors
    header whose entries cover the rest of a file of ``file_size`` bytes without gap or overlap.
    """
    data_start = parse_data_start(prefix, file_size)
    if len(prefix) < data_start:
        raise _invalid(f"{len(prefix)} of {data_start} bytes were read")
    body = prefix[_LENGTH_BYTES:data_start]
    metadata, entries = _parse_ours(body) or _parse_any(body)
    columns = _check_layout(list(entries.values()), file_size - data_start)
    return ParsedHeader(entries, metadata, data_start, columns)


_BEFORE_METADATA = b'{"__metadata__":'
_IN_EACH_ENTRY = b'"data_offsets":['


def _parse_ours(body: bytes) -> tuple[dict[str, str], dict[str, ParsedEntry]] | None:
    """A header as ``encode_header`` writes it, fast; None for any other."""
    if not body.startswith(_BEFORE_METADATA):
        return None
    try:
        text = body.decode("utf-8")
        metadata, end = _metadata_decoder.raw_decode(text, len(_BEFORE_METADATA))
        rest = text[end:].removeprefix(",")
        entries = _entries_decoder.decode("{" + rest)
    except (ValueError, RecursionError):
        return None
    # No string can hold this text, whose quotes would be escaped in it: keys that are there twice
    # show in its count. Their names may not be what is there once already.
    if body.count(_IN_EACH_ENTRY) != len(entries) or _METADATA in entries:
        return None
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        return None
    return metadata, entries


def _parse_any(body: bytes) -> tuple[dict[str, str], dict[str, ParsedEntry]]:
    """Any safetensors header; what is wrong with it is told."""
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _invalid(str(error)[:200]) from error
    if not isinstance(found, dict):
        raise _invalid("it is not an object")
    metadata = found.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise _invalid("its metadata is not a mapping of strings")
    return metadata, {name: _parse_entry(name, fields) for name, fields in found.items()}


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is there twice")
    return fields


_metadata_decoder = json.JSONDecoder(object_pairs_hook=_distinct)
_entries_decoder = msgspec.json.Decoder(dict[str, ParsedEntry])


def _parse_entry(name: str, fields: object) -> ParsedEntry:
    if isinstance(fields, dict) and fields.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, place = fields["dtype"], fields["shape"], fields["data_offsets"]
        if type(dtype) is str and _are_sizes(shape) and _are_sizes(place) and len(place) == 2:
            return ParsedEntry(dtype, tuple(shape), (place[0], place[1]))
    raise _invalid(f"entry {name[:80]!r} is not a dtype, a shape and two offsets")


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _check_layout(entries: Sequence[ParsedEntry], data_size: int) -> EntryColumns:
    """All at once: the entries follow each other up to ``data_size``, as long as they should be."""
    count = len(entries)
    try:
        places = np.fromiter(
            chain.from_iterable([entry.data_offsets for entry in entries]), np.int64, 2 * count
        ).reshape(count, 2)
    except OverflowError as error:
        raise _invalid("an offset is absurdly large") from error
    order = np.lexsort((places[:, 1], places[:, 0]))
    begins, ends = places[order, 0], places[order, 1]
    positions = np.concatenate(([0], ends))
    wrong = np.flatnonzero((begins != positions[:-1]) | (ends < begins))
    if len(wrong):
        at = int(wrong[0])
        raise _invalid(
            f"bytes {begins[at]} to {ends[at]} follow on byte {positions[at]}: a gap or an overlap"
        )
    if positions[-1] != data_size:
        raise _invalid(f"its entries end at byte {positions[-1]} of {data_size}")
    each = [(entry.dtype, entry.shape) for entry in entries]
    stored = {kind: row for row, kind in enumerate(dict.fromkeys(each))}
    kinds = np.fromiter(map(stored.__getitem__, each), np.int64, count)[order]
    # What does not fit into the file fits no entry, however large.
    sizes = np.array([min(_entry_bytes(*kind), data_size + 1) for kind in stored], np.int64)
    wrong = np.flatnonzero(sizes[kinds] != ends - begins) if count else order
    if len(wrong):
        raise _wrong_size(entries[int(order[wrong[0]])])
    return EntryColumns(begins=begins, ends=ends, kinds=kinds, stored=stored)


def _entry_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array; -1 if they are not a whole number, which no entry has."""
    bits = _BITS.get(dtype)
    if bits is None:
        raise _invalid(f"dtype {dtype[:20]!r}")
    if not all(0 <= size < 1 << 63 for size in shape):
        raise _invalid(f"shape {list(shape)}")
    total = math.prod(shape) * bits
    return -1 if total % 8 else total // 8


def _wrong_size(entry: ParsedEntry) -> DamagedCheckpointError:
    return _invalid(
        f"{entry.end - entry.begin} bytes for {entry.dtype} of shape {list(entry.shape)}"
    )


def _invalid(what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"the header of a data file is invalid: {what}", kind="header_mismatch"
    )


_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits per element of every dtype that safetensors 0.8 knows."""
