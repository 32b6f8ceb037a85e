"""Interests to the coordinator and shares back, as compressed bytes.

Belongs here: encoding and validation. Does not belong here: any decision (``shared_reads``).
"""

from __future__ import annotations

from dataclasses import fields

import msgspec
import numpy as np
import numpy.typing as npt

from dcp_engine.planning.packing import Packed, malformed, pack, unpack
from dcp_engine.planning.shared_interests import Interests
from dcp_engine.planning.shared_reads import RankShare

__all__ = ["decode_interests", "decode_share", "encode_interests", "encode_share"]

I64 = npt.NDArray[np.int64]

_LEVEL = 1
_WIDE = frozenset({"chunk_sizes", "within", "lengths", "send_within", "send_lengths"})
"""Columns of two dimensions."""
_ASCENDING = frozenset({"file", "chunk_start", "rows", "slab_row", "slab_begin", "slab_end"})
"""Columns whose neighbours are close."""
_MAX_DIMS = 64


class _Frame(msgspec.Struct, array_like=True, frozen=True):
    width: int
    columns: Packed


def encode_interests(interests: Interests) -> bytes:
    """One rank's interests as bytes."""
    return _encode(interests, interests.chunk_sizes.shape[1])


def decode_interests(data: bytes) -> Interests:
    """The inverse of ``encode_interests``.

    Raises ``CoordinationError(kind="out_of_step")`` for what no encoder of this version wrote.
    """
    columns = _decode(data, Interests)
    _require_equal(columns, tuple(columns))
    return Interests(**columns)


def encode_share(share: RankShare) -> bytes:
    """One rank's part as bytes."""
    return _encode(share, share.send_within.shape[1])


def decode_share(data: bytes) -> RankShare:
    """The inverse of ``encode_share``, with the same errors as ``decode_interests``."""
    columns = _decode(data, RankShare)
    for prefix in ("slab_", "send_", "receive_"):
        _require_equal(columns, tuple(name for name in columns if name.startswith(prefix)))
    return RankShare(**columns)


def _encode(value: Interests | RankShare, width: int) -> bytes:
    arrays = [(f.name, getattr(value, f.name)) for f in fields(value)]
    packed = pack([(array.ravel(), name in _ASCENDING) for name, array in arrays], level=_LEVEL)
    return msgspec.msgpack.encode(_Frame(width=width, columns=packed))


def _decode(data: bytes, cls: type[Interests] | type[RankShare]) -> dict[str, I64]:
    try:
        frame = msgspec.msgpack.decode(data, type=_Frame)
    except msgspec.MsgspecError as error:
        raise malformed(str(error)) from error
    if not 0 < frame.width <= _MAX_DIMS:
        raise malformed(f"{frame.width} dimensions")
    names = [f.name for f in fields(cls)]
    columns = dict(zip(names, unpack(frame.columns, len(names)), strict=True))
    for name in _WIDE.intersection(names):
        if len(columns[name]) % frame.width:
            raise malformed(f"{len(columns[name])} numbers in rows of {frame.width}")
        columns[name] = columns[name].reshape(-1, frame.width)
    return columns


def _require_equal(columns: dict[str, I64], names: tuple[str, ...]) -> None:
    lengths = {len(columns[name]) for name in names}
    if len(lengths) > 1:
        raise malformed(f"columns of {sorted(lengths)} rows")
