"""Integer arrays as compressed bytes.

Each array is stored in the smallest integer type that holds it, as differences where the caller
says that neighbours are close, and all of them go through one zlib stream. Belongs here: that
encoding and its checks. Does not belong here: what the arrays mean (``wire``).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.errors import CoordinationError

__all__ = ["Packed", "inflate", "malformed", "pack", "unpack"]

I64 = npt.NDArray[np.int64]

_TYPES = tuple(np.dtype(t) for t in ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<i8"))
_LIMITS = tuple((int(np.iinfo(t).min), int(np.iinfo(t).max)) for t in _TYPES)
_MAX_BYTES = 1 << 31
"""Of a table, and of one message's arrays once each value takes eight bytes: what a small message
may make of itself."""


class Packed(msgspec.Struct, array_like=True, frozen=True):
    """Arrays on the wire: for each its type, whether it holds differences, and its length."""

    types: bytes
    counts: list[int]
    data: bytes


def malformed(detail: str) -> CoordinationError:
    """The error for a message that no version of this code has sent."""
    return CoordinationError(
        f"a rank sent a plan that cannot be read: {detail}",
        kind="out_of_step",
        hint="run the same version of dcp_engine on all ranks",
    )


def pack(arrays: Sequence[tuple[npt.NDArray[np.integer], bool]], *, level: int) -> Packed:
    """Encode one-dimensional arrays; the flag asks for differences between neighbours."""
    types = bytearray()
    parts: list[bytes] = []
    for array, differences in arrays:
        values = array.astype(np.int64, copy=False)
        if differences and len(values):
            values = np.concatenate((values[:1], np.diff(values)))
        code = _smallest(values)
        types.append(code << 1 | differences)
        parts.append(values.astype(_TYPES[code]).tobytes())
    return Packed(
        types=bytes(types),
        counts=[len(array) for array, _ in arrays],
        data=zlib.compress(b"".join(parts), level),
    )


def unpack(packed: Packed, expected: int) -> list[I64]:
    """Decode exactly ``expected`` arrays."""
    if len(packed.types) != expected or len(packed.counts) != expected:
        raise malformed(f"{len(packed.counts)} arrays where {expected} were expected")
    total = 0
    for code, count in zip(packed.types, packed.counts, strict=True):
        if code >> 1 >= len(_TYPES) or count < 0:
            raise malformed(f"an array of type {code} and length {count}")
        total += _TYPES[code >> 1].itemsize * count
    if sum(packed.counts) * 8 > _MAX_BYTES:
        raise malformed(f"{sum(packed.counts)} numbers announced")
    data = inflate(packed.data, total)
    if len(data) != total:
        raise malformed(f"{len(data)} bytes of arrays where {total} were announced")
    arrays: list[I64] = []
    position = 0
    for code, count in zip(packed.types, packed.counts, strict=True):
        kind = _TYPES[code >> 1]
        values = np.frombuffer(data, dtype=kind, count=count, offset=position).astype(np.int64)
        position += kind.itemsize * count
        arrays.append(np.cumsum(values) if code & 1 else values)
    return arrays


def inflate(data: bytes, limit: int) -> bytes:
    """Decompress at most ``limit`` bytes; more than that is malformed."""
    # A limit below 0 would be none at all to zlib.
    if not 0 <= limit <= _MAX_BYTES:
        raise malformed(f"{limit} bytes announced")
    engine = zlib.decompressobj()
    try:
        # A limit of 0 means none to zlib; one byte more than allowed shows that there is more.
        result = engine.decompress(data, limit + 1)
    except zlib.error as error:
        raise malformed(f"compressed data is damaged ({error})") from error
    if len(result) > limit or not engine.eof:
        raise malformed("compressed data does not have the announced length")
    return result


def _smallest(values: I64) -> int:
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return next(i for i, (least, most) in enumerate(_LIMITS) if least <= low and high <= most)
