"""The tagged encoding: one byte that says the type, then the value. See ``docs/format.md``.

Belongs here: encoding and decoding of plain Python values and the types in ``tagged_types``.
Decoding never runs code, imports nothing, recurses at most ``MAX_DEPTH`` deep, and allocates in
proportion to the bytes it is given.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from dcp_engine.errors import DamagedCheckpointError
from dcp_engine.format import tagged_types
from dcp_engine.format.tagged_types import NotTaggable, Reader, invalid, varint

__all__ = ["ENCODING_VERSION", "MAX_DEPTH", "NotTaggable", "decode", "encode"]

ENCODING_VERSION = 1
MAX_DEPTH = 100
"""Containers in containers. What is nested deeper, or contains itself, has no tagged encoding."""

_PACKED_INTS: dict[type, bytes] = {list: b"I", tuple: b"J"}
_PACKED_FLOATS: dict[type, bytes] = {list: b"D", tuple: b"G"}
_MIN_PACKED = 8
"""Shorter sequences are written value by value."""
_MAX_EQUAL_HASHES = 100
_INT64 = range(-(1 << 63), 1 << 63)


def encode(value: object) -> bytes:
    """Encode ``value``. Raises ``NotTaggable`` if it, or anything in it, has no exact encoding."""
    parts: list[bytes] = [bytes([ENCODING_VERSION])]
    _encode(value, parts, 0)
    return b"".join(parts)


def decode(data: bytes) -> object:
    """The value that ``data`` encodes.

    Raises ``DamagedCheckpointError`` (``object_invalid``) for anything that ``encode`` does not
    make, and ``UnsafeContentError`` for an Enum whose module is not imported.
    """
    if not data:
        raise invalid("it is empty")
    if data[0] != ENCODING_VERSION:
        raise invalid(f"its encoding has version {data[0]}, this one reads {ENCODING_VERSION}")
    reader = Reader(data, 1)
    try:
        value = _decode(reader, 0)
    except DamagedCheckpointError:
        raise
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        # What the constructors of the types refuse: a date in month 13, a list in a set.
        raise invalid(f"{type(error).__name__}: {error}") from error
    if reader.position != len(data):
        raise invalid(f"{len(data) - reader.position} bytes are left over")
    return value


def _encode(value: Any, parts: list[bytes], depth: int) -> None:
    kind = type(value)
    scalar = _SCALARS.get(kind)
    if scalar is not None:
        parts.append(scalar(value))
        return
    if kind not in _CONTAINERS:
        parts.append(tagged_types.encode(value))
        return
    if depth >= MAX_DEPTH:
        raise NotTaggable
    if kind is list or kind is tuple:
        packed = _pack(value, kind)
        if packed is not None:
            parts.append(packed)
            return
    parts.append(_CONTAINERS[kind] + varint(len(value)))
    if kind is dict or kind is OrderedDict:
        for key, item in value.items():
            _encode(key, parts, depth + 1)
            _encode(item, parts, depth + 1)
    elif kind is set or kind is frozenset:
        # Sorted by encoding, because the order of a set changes from process to process.
        parts.extend(sorted(_encode_alone(item, depth + 1) for item in value))
    else:
        for item in value:
            _encode(item, parts, depth + 1)


def _encode_alone(value: object, depth: int) -> bytes:
    parts: list[bytes] = []
    _encode(value, parts, depth)
    return b"".join(parts)


def _pack(value: list[Any] | tuple[Any, ...], kind: type) -> bytes | None:
    """Long sequences of ints or floats as one array: param_groups list thousands of ints."""
    if len(value) < _MIN_PACKED:
        return None
    kinds = set(map(type, value))
    if kinds == {float}:
        return _PACKED_FLOATS[kind] + varint(len(value)) + np.array(value, "<f8").tobytes()
    if kinds == {int} and min(value) in _INT64 and max(value) in _INT64:
        return _PACKED_INTS[kind] + varint(len(value)) + np.array(value, "<i8").tobytes()
    return None


def _encode_int(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"i" + varint(size) + value.to_bytes(size, "little", signed=True)


def _encode_str(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"s" + varint(len(data)) + data


_SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: _encode_int,
    float: lambda value: b"d" + struct.pack("<d", value),
    complex: lambda value: b"c" + struct.pack("<dd", value.real, value.imag),
    str: _encode_str,
    bytes: lambda value: b"b" + varint(len(value)) + value,
    bytearray: lambda value: b"B" + varint(len(value)) + bytes(value),
}
_CONTAINERS: dict[type, bytes] = {
    list: b"l",
    tuple: b"t",
    set: b"e",
    frozenset: b"z",
    dict: b"m",
    OrderedDict: b"o",
}


def _decode(reader: Reader, depth: int) -> object:
    tag = reader.take(1)
    plain = _PLAIN.get(tag)
    if plain is not None:
        return plain(reader)
    if tag in _SEQUENCES or tag in _MAPPINGS:
        if depth >= MAX_DEPTH:
            raise invalid(f"it is nested more than {MAX_DEPTH} deep")
        count = reader.count()
        if tag in _SEQUENCES:
            items = [_decode(reader, depth + 1) for _ in range(count)]
            if tag in _HASHED:
                _check_hashes(items)
            value = _SEQUENCES[tag](items)
            if len(value) != count:
                raise invalid("a set holds an element twice")
            return value
        pairs = [(_decode(reader, depth + 1), _decode(reader, depth + 1)) for _ in range(count)]
        _check_hashes([key for key, _ in pairs])
        mapping = _MAPPINGS[tag](pairs)
        if len(mapping) != count:
            raise invalid("a dict holds a key twice")
        return mapping
    return tagged_types.decode(tag, reader)


def _check_hashes(keys: Collection[object]) -> None:
    """Numbers can be chosen so that their hashes are equal; n of them would take n**2 comparisons
    to put into a set. What was saved took as long then, and so does not hold many."""
    if len(keys) <= _MAX_EQUAL_HASHES:
        return
    if max(Counter(map(hash, keys)).values()) > _MAX_EQUAL_HASHES:
        raise invalid(f"more than {_MAX_EQUAL_HASHES} keys have one hash")


def _decode_int(reader: Reader) -> int:
    return int.from_bytes(reader.take(reader.count()), "little", signed=True)


def _packed(dtype: str, make: Callable[[list[Any]], object]) -> Callable[[Reader], object]:
    def read(reader: Reader) -> object:
        data = reader.take(reader.count(8) * 8)
        return make(np.frombuffer(data, dtype).tolist())

    return read


_PLAIN: dict[bytes, Callable[[Reader], object]] = {
    b"N": lambda reader: None,
    b"T": lambda reader: True,
    b"F": lambda reader: False,
    b"i": _decode_int,
    b"d": lambda reader: struct.unpack("<d", reader.take(8))[0],
    b"c": lambda reader: complex(*struct.unpack("<dd", reader.take(16))),
    b"s": Reader.text,
    b"b": lambda reader: reader.take(reader.count()),
    b"B": lambda reader: bytearray(reader.take(reader.count())),
    b"I": _packed("<i8", list),
    b"J": _packed("<i8", tuple),
    b"D": _packed("<f8", list),
    b"G": _packed("<f8", tuple),
}
_SEQUENCES: dict[bytes, Callable[[list[object]], Any]] = {
    b"l": list,
    b"t": tuple,
    b"e": set,
    b"z": frozenset,
}
_HASHED = frozenset((b"e", b"z"))
_MAPPINGS: dict[bytes, Callable[[list[tuple[object, object]]], dict[object, object]]] = {
    b"m": dict,
    b"o": OrderedDict,
}
