"""JSON as this format writes it: objects without repeated keys, and columns of integers.

Belongs here: the few strict readers that every section of a manifest is decoded with. Does not
belong here: which fields there are.

A column is written as one integer (all values equal), as ``"start:step"`` (an arithmetic
progression), or as a list. The number of rows always comes from a column that is a list, so that
what a column expands to is bounded by the bytes that were read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.errors import DamagedCheckpointError

__all__ = [
    "Column",
    "check_range",
    "decode_as",
    "encode_column",
    "encode_fields",
    "encode_list",
    "expand_column",
    "field_parts",
    "object_fields",
    "parse_progression",
    "read",
    "refuse",
]

I64 = npt.NDArray[np.int64]
T = TypeVar("T")

Column = int | str | list[int]
"""A column as it stands in JSON."""

_MIN_PROGRESSION = 4
"""Shorter progressions are shorter as lists."""
_PROGRESSION = re.compile(r"(0|[1-9][0-9]{0,18}):(-?[1-9][0-9]{0,18})")
_encoder = msgspec.json.Encoder()


def refuse(what: str, *, kind: str = "manifest_invalid", tensor: str | None = None) -> NoReturn:
    """Raise ``DamagedCheckpointError``."""
    raise DamagedCheckpointError(f"the manifest is invalid: {what}", kind=kind, tensor=tensor)


def read(what: str, decode: Callable[[], T]) -> T:
    """Run ``decode``, turning every way in which bytes are not the expected JSON into a
    ``DamagedCheckpointError`` that says where: ``what`` and the path of the field below it."""
    try:
        return decode()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, DamagedCheckpointError):
            raise
        raise DamagedCheckpointError(f"the manifest is invalid: {what}: {error}") from error


_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def object_fields(data: bytes | memoryview | msgspec.Raw, what: str) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, undecoded. Refuses an object that holds a key twice, or white
    space between its keys and values, of which the format has none.

    JSON decoders keep the last of two equal keys, others the first: two readers would see two
    checkpoints. What was dropped shows in the length.
    """
    fields = read(what, lambda: _raw_fields.decode(data))
    length = 2 + max(len(fields) - 1, 0)
    for key, value in fields.items():
        length += len(_encoder.encode(key)) + 1 + len(memoryview(value))
    if length != len(memoryview(data)):
        refuse(f"{what}: a key is there twice, or white space is")
    return fields


def encode_fields(fields: Mapping[str, bytes | Sequence[bytes]]) -> bytes:
    """A JSON object of encoded values, or lists of such; keys are plain ASCII."""
    return b"".join(field_parts(fields))


def field_parts(fields: Mapping[str, bytes | Sequence[bytes]]) -> list[bytes]:
    """The same, to be joined once: values may have tens of megabytes, and every copy of one costs
    fresh memory."""
    parts: list[bytes] = []
    for key, value in fields.items():
        parts += (b"," if parts else b"{", b'"%b":' % key.encode())
        if isinstance(value, bytes):
            parts.append(value)
            continue
        opening = b"["
        for element in value:
            parts += (opening, element)
            opening = b","
        parts.append(b"]" if value else b"[]")
    parts.append(b"}" if parts else b"{}")
    return parts


def encode_list(values: I64 | npt.NDArray[np.int32]) -> bytes:
    """A list of integers."""
    return _encoder.encode(values.tolist())


def encode_column(values: I64 | npt.NDArray[np.int32]) -> bytes:
    """The shortest of the three ways to write a column of non-negative integers."""
    count = len(values)
    if count == 0:
        return b"0"
    first = int(values[0])
    if int(values[-1]) == first and bool((values == first).all()):
        return str(first).encode()
    if count >= _MIN_PROGRESSION:
        step = int(values[1]) - first
        if int(values[-1]) == first + step * (count - 1) and bool((np.diff(values) == step).all()):
            return f'"{first}:{step}"'.encode()
    return encode_list(values)


_FEW = 64
"""Up to so many values numpy takes longer to begin than Python to finish; tables of so few rows
are most of the tables there are."""


def expand_column(column: Column, count: int, limit: int, what: str) -> I64:
    """The ``count`` values of a column, all from 0 up to but not including ``limit``.

    Raises ``DamagedCheckpointError`` for another number of values and for values out of range.
    """
    if isinstance(column, list):
        if len(column) != count:
            refuse(f"{what}: {len(column)} values for {count} rows")
        if 0 < count <= _FEW:
            if min(column) < 0 or max(column) >= limit:
                refuse(f"{what}: a value is not from 0 to {limit - 1}")
            return _int64(column, what)
        values = _int64(column, what)
    elif isinstance(column, int):
        if not 0 <= column < limit:
            if count == 0 and column == 0:
                return np.empty(0, np.int64)
            refuse(f"{what}: {column} is not from 0 to {limit - 1}")
        if count <= _FEW:
            return np.full(count, column, np.int64)
        return np.broadcast_to(np.int64(column), (count,))
    else:
        progression = parse_progression(column)
        if progression is None:
            refuse(f"{what}: {column[:40]!r} is not a column")
        first, step = progression
        last = first + step * max(count - 1, 0)
        if not (0 <= first < limit and 0 <= last < limit and abs(step) < limit):
            refuse(f"{what}: {column} leaves 0 to {limit - 1}")
        return first + step * np.arange(count, dtype=np.int64)
    return check_range(values, limit, what)


def parse_progression(column: str) -> tuple[int, int] | None:
    """First value and step (not 0) of ``"start:step"``; None for any other text."""
    match = _PROGRESSION.fullmatch(column)
    return None if match is None else (int(match.group(1)), int(match.group(2)))


def check_range(values: I64, limit: int, what: str) -> I64:
    """``values``, all from 0 up to but not including ``limit``."""
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= limit):
        refuse(f"{what}: a value is not from 0 to {limit - 1}")
    return values


def _int64(values: list[int], what: str) -> I64:
    try:
        return np.fromiter(values, np.int64, len(values))  # np.array takes a third longer
    except OverflowError:
        refuse(f"{what}: a value has more than 64 bits")


def decode_as(kind: Any, data: bytes | msgspec.Raw, what: str) -> Any:
    """Decode ``data`` as ``kind``; see ``read``."""
    return read(what, lambda: msgspec.json.decode(data, type=kind))
