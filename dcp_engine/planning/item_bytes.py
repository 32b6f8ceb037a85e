"""Objects as the bytes that items carry: what ``transform_object`` makes and ``load_bytes`` reads.

Planners written for torch's DCP call ``torch.load`` on these bytes, so they are what
``torch.save`` makes wherever its safe reader (``weights_only=True``) can read that back. Values
for which it cannot, but which have a tagged encoding, are framed: ``MAGIC``, then the encoding.
What is left is a pickle, read only by whoever allows it. No pickle begins like ``MAGIC``.
"""

from __future__ import annotations

import io
import pickle

import torch

from dcp_engine.errors import UnsafeContentError
from dcp_engine.format.object_codec import EncodedObject, decode_object, encode_object

__all__ = ["MAGIC", "from_item_bytes", "item_bytes", "read_item_bytes", "to_item_bytes"]

MAGIC = b"\x93dcp_engine.object\x01\n"


def item_bytes(value: object, *, fqn: str) -> io.BytesIO:
    """Encode ``value`` for an item; the buffer stands at its begin.

    Raises ``UnsupportedStateError`` for what cannot be pickled.
    """
    encoded = encode_object(value, fqn=fqn)
    if encoded.pickled:
        return io.BytesIO(encoded.data)
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return io.BytesIO(MAGIC + encoded.data)
    buffer.seek(0)
    return buffer


def read_item_bytes(data: io.BytesIO, *, fqn: str, allow_pickle: bool = False) -> object:
    """The value in ``data``, from its position on.

    Raises ``UnsafeContentError(kind="pickle_refused")`` for a pickle that would run code, unless
    ``allow_pickle``; ``DamagedCheckpointError(kind="object_invalid")`` for what is neither.
    """
    encoded = from_item_bytes(raw := data.read())
    if raw[: len(_TAGGED)] == _TAGGED:
        # The engine's own encoding without a frame: from a reader that hands out stored bytes.
        encoded = EncodedObject(raw, pickled=False)
    try:
        return decode_object(encoded.data, encoded.pickled, fqn=fqn, allow_pickle=allow_pickle)
    except UnsafeContentError as error:
        error.hint = (
            "if you trust whoever wrote the checkpoint, load with allow_pickle=True, or with "
            "planner=DefaultLoadPlanner(allow_pickle=True)"
        )
        raise


def from_item_bytes(data: bytes) -> EncodedObject:
    """An item's bytes as the engine's format stores them. Bytes that a planner made up itself
    count as pickled: they come back to its ``load_bytes`` unchanged, and nobody else reads them."""
    if data.startswith(MAGIC):
        return EncodedObject(data[len(MAGIC) :], pickled=False)
    return EncodedObject(data, pickled=True)


def to_item_bytes(encoded: EncodedObject, *, fqn: str) -> io.BytesIO:
    """The inverse of ``from_item_bytes``, for an object that either kind of planner stored."""
    if encoded.pickled:
        return io.BytesIO(encoded.data)
    return item_bytes(decode_object(encoded.data, False, fqn=fqn), fqn=fqn)
