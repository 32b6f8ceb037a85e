"""Tagged encodings of types that are not plain Python values: torch, numpy, dates, paths, enums.

Belongs here: one encoder and one decoder per type, and the reader they share. Only exact types
are encoded; a subclass would come back as its base.
"""

from __future__ import annotations

import datetime
import enum
import pathlib
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dcp_engine.errors import DamagedCheckpointError, UnsafeContentError

__all__ = ["NotTaggable", "Reader", "decode", "encode", "invalid", "varint"]


class NotTaggable(Exception):
    """The value has no exact tagged encoding. A signal to the caller, never seen outside."""


def invalid(what: str) -> DamagedCheckpointError:
    """The error for bytes that ``encode`` never makes."""
    return DamagedCheckpointError(
        f"the encoding of an object is invalid: {what}", kind="object_invalid"
    )


def varint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """A position in the bytes being decoded. Every read is checked against the end."""

    __slots__ = ("data", "position")

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self.position + count
        if end > len(self.data):
            raise invalid("it ends early")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self) -> int:
        """A varint, of up to 64 bits."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise invalid("a length has more than 64 bits")
        if byte == 0 and shift:
            raise invalid("a length has leading zeros")
        return value

    def count(self, unit: int = 1) -> int:
        """A varint that counts things of at least ``unit`` bytes each, which must be there."""
        value = self.number()
        if value * unit > len(self.data) - self.position:
            raise invalid("it ends early")
        return value

    def text(self) -> str:
        """A string."""
        return self.take(self.count()).decode("utf-8", "surrogatepass")


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return varint(len(data)) + data


def encode(value: Any) -> bytes:
    """Encode a value of one of these types. Raises ``NotTaggable`` for others."""
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        return encoder(value)
    if isinstance(value, enum.Enum):
        return _encode_enum(value)
    if isinstance(value, np.generic):
        return _encode_array(b"g", value, np.asarray(value))
    raise NotTaggable


def decode(tag: bytes, reader: Reader) -> object:
    """Decode what follows ``tag``."""
    decoder = _DECODERS.get(tag)
    if decoder is None:
        raise invalid(f"there is no tag {tag!r}")
    return decoder(reader)


# numpy -------------------------------------------------------------------------------------------

_ARRAY_DTYPE = re.compile(
    r"[<>|](b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|[SU][1-9][0-9]{0,8}"
    r"|[mM]8(\[[1-9]?[0-9]{0,8}[a-zA-Z]{1,2}\])?)"
)


def _encode_array(tag: bytes, value: object, array: np.ndarray[Any, Any]) -> bytes:
    name = array.dtype.str
    # Extension types (ml_dtypes), records and objects have names that do not lead back to them.
    if _ARRAY_DTYPE.fullmatch(name) is None or np.dtype(name) != array.dtype:
        raise NotTaggable
    if tag == b"g" and type(value) is not array.dtype.type:
        raise NotTaggable
    if array.dtype.metadata:
        raise NotTaggable
    shape = b"".join(varint(size) for size in array.shape)
    return tag + _text(name) + varint(array.ndim) + shape + _elements(array)


_X87_BYTES = 10 if np.finfo(np.longdouble).nmant == 63 else None
"""Of a ``longdouble`` that is an x87 number; what follows them up to its size is padding."""


def _elements(array: np.ndarray[Any, Any]) -> bytes:
    """The elements, row-major. Padding becomes zeros: it holds what happened to be in memory, so
    equal values would differ, and memory that is nobody's business would be stored."""
    data = array.tobytes("C")
    if _X87_BYTES is None or array.dtype.type not in (np.longdouble, np.clongdouble):
        return data
    numbers = np.frombuffer(bytearray(data), np.uint8)
    numbers = numbers.reshape(-1, np.dtype(np.longdouble).itemsize)
    if array.dtype.str[0] == "<":
        numbers[:, _X87_BYTES:] = 0
    else:
        numbers[:, :-_X87_BYTES] = 0
    return numbers.tobytes()


def _read_array(reader: Reader) -> np.ndarray[Any, Any]:
    name = reader.text()
    if _ARRAY_DTYPE.fullmatch(name) is None:
        raise invalid(f"an array has dtype {name[:40]!r}")
    dtype = np.dtype(name)
    shape = [reader.number() for _ in range(reader.count())]
    if len(shape) > 64:
        raise invalid("an array has more than 64 dimensions")
    total = 1
    for size in shape:
        total *= size
    data = reader.take(total * dtype.itemsize)
    if dtype.kind == "b" and data.translate(None, b"\x00\x01"):
        raise invalid("a bool is neither 0 nor 1")
    # The copy makes it writable, as the array that was saved.
    return np.frombuffer(data, dtype, count=total).reshape(shape).copy()


def _decode_numpy_scalar(reader: Reader) -> object:
    array = _read_array(reader)
    if array.ndim:
        raise invalid("a numpy scalar has dimensions")
    return array[()]


# torch -------------------------------------------------------------------------------------------


def _encode_dtype(value: torch.dtype) -> bytes:
    name = str(value).removeprefix("torch.")
    if getattr(torch, name, None) is not value:
        raise NotTaggable
    return b"y" + _text(name)


def _decode_dtype(reader: Reader) -> torch.dtype:
    name = reader.text()
    value = vars(torch).get(name)
    if not isinstance(value, torch.dtype):
        raise invalid(f"this torch has no dtype {name[:40]!r}")
    return value


def _decode_device(reader: Reader) -> torch.device:
    name = reader.text()
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise invalid(f"this torch has no device {name[:40]!r}") from error


def _encode_size(value: torch.Size) -> bytes:
    return b"h" + varint(len(value)) + struct.pack(f"<{len(value)}q", *value)


def _decode_size(reader: Reader) -> torch.Size:
    count = reader.count(8)
    return torch.Size(struct.unpack(f"<{count}q", reader.take(8 * count)))


# dates, paths, ranges ----------------------------------------------------------------------------

_DATETIME = struct.Struct("<HBBBBBIB")
_TIME = struct.Struct("<BBBIB")
_DATE = struct.Struct("<HBB")
_DELTA = struct.Struct("<qqq")


def _encode_zone(zone: datetime.tzinfo | None) -> bytes:
    if zone is None:
        return b"N"
    if type(zone) is not datetime.timezone:
        raise NotTaggable
    offset = zone.utcoffset(None)
    # A zone with a name of its own is equal to, but not the same as, the one without.
    if zone.tzname(None) != datetime.timezone(offset).tzname(None):
        raise NotTaggable
    return b"Z" + _DELTA.pack(offset.days, offset.seconds, offset.microseconds)


def _read_zone(reader: Reader) -> datetime.timezone | None:
    tag = reader.take(1)
    if tag == b"N":
        return None
    if tag != b"Z":
        raise invalid("a time zone is neither absent nor an offset")
    return datetime.timezone(_read_delta(reader))


def _encode_datetime(value: datetime.datetime) -> bytes:
    fields = (value.year, value.month, value.day, value.hour, value.minute, value.second)
    return (
        b"A" + _DATETIME.pack(*fields, value.microsecond, value.fold) + _encode_zone(value.tzinfo)
    )


def _decode_datetime(reader: Reader) -> datetime.datetime:
    *fields, fold = _DATETIME.unpack(reader.take(_DATETIME.size))
    return datetime.datetime(*fields).replace(tzinfo=_read_zone(reader), fold=fold)


def _encode_time(value: datetime.time) -> bytes:
    packed = _TIME.pack(value.hour, value.minute, value.second, value.microsecond, value.fold)
    return b"C" + packed + _encode_zone(value.tzinfo)


def _decode_time(reader: Reader) -> datetime.time:
    *fields, fold = _TIME.unpack(reader.take(_TIME.size))
    return datetime.time(*fields).replace(tzinfo=_read_zone(reader), fold=fold)


def _encode_timedelta(value: datetime.timedelta) -> bytes:
    return b"X" + _DELTA.pack(value.days, value.seconds, value.microseconds)


def _read_delta(reader: Reader) -> datetime.timedelta:
    days, seconds, microseconds = _DELTA.unpack(reader.take(_DELTA.size))
    return datetime.timedelta(days, seconds, microseconds)


def _encode_range(value: range) -> bytes:
    fields = (value.start, value.stop, value.step)
    if any(not -(1 << 63) <= field < 1 << 63 for field in fields):
        raise NotTaggable
    return b"r" + _DELTA.pack(*fields)


# enums -------------------------------------------------------------------------------------------


def _find_enum(module: str, qualname: str) -> type[enum.Enum] | None:
    """The Enum of that name in a module that is imported already. Nothing is imported and no
    ``__getattr__`` is called: either would run code of the checkpoint's choosing."""
    found: object = sys.modules.get(module)
    for part in qualname.split("."):
        if not isinstance(found, type(sys) | type):
            return None
        found = vars(found).get(part)
    if isinstance(found, type) and issubclass(found, enum.Enum):
        return found
    return None


def _encode_enum(value: enum.Enum) -> bytes:
    kind = type(value)
    name = getattr(value, "name", None)
    # A composed flag has no name of its own; a local class is not found again.
    if kind.__members__.get(str(name)) is not value:
        raise NotTaggable
    if _find_enum(kind.__module__, kind.__qualname__) is not kind:
        raise NotTaggable
    return b"E" + _text(kind.__module__) + _text(kind.__qualname__) + _text(str(name))


def _decode_enum(reader: Reader) -> enum.Enum:
    module, qualname, name = reader.text(), reader.text(), reader.text()
    if module not in sys.modules:
        raise UnsafeContentError(
            f"the object is a {module[:80]}.{qualname[:80]}, and loading does not import modules",
            kind="import_refused",
            hint=f"import {module[:80]} before loading",
        )
    kind = _find_enum(module, qualname)
    member = kind.__members__.get(name) if kind is not None else None
    if member is None:
        raise invalid(f"there is no {module[:80]}.{qualname[:80]}.{name[:80]} here")
    return member


_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    torch.Size: _encode_size,
    torch.dtype: _encode_dtype,
    torch.device: lambda value: b"v" + _text(str(value)),
    np.ndarray: lambda value: _encode_array(b"a", value, value),
    datetime.datetime: _encode_datetime,
    datetime.date: lambda value: b"O" + _DATE.pack(value.year, value.month, value.day),
    datetime.time: _encode_time,
    datetime.timedelta: _encode_timedelta,
    range: _encode_range,
    # The concrete class of this platform; on another one it comes back as that one's.
    type(pathlib.Path()): lambda value: b"P" + _text(str(value)),
    pathlib.PurePosixPath: lambda value: b"Q" + _text(str(value)),
    pathlib.PureWindowsPath: lambda value: b"W" + _text(str(value)),
}
_DECODERS: dict[bytes, Callable[[Reader], object]] = {
    b"h": _decode_size,
    b"y": _decode_dtype,
    b"v": _decode_device,
    b"a": _read_array,
    b"g": _decode_numpy_scalar,
    b"A": _decode_datetime,
    b"O": lambda reader: datetime.date(*_DATE.unpack(reader.take(_DATE.size))),
    b"C": _decode_time,
    b"X": _read_delta,
    b"r": lambda reader: range(*_DELTA.unpack(reader.take(_DELTA.size))),
    b"P": lambda reader: pathlib.Path(reader.text()),
    b"Q": lambda reader: pathlib.PurePosixPath(reader.text()),
    b"W": lambda reader: pathlib.PureWindowsPath(reader.text()),
    b"E": _decode_enum,
}
