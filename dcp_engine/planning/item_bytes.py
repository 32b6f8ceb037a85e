"""Objects as the bytes that items carry: what ``transform_object`` makes and ``load_bytes`` reads.

Planners written for torch's DCP call ``torch.load`` on these bytes, so they are what
``torch.save`` makes wherever its safe reader (``weights_only=True``) can read that back. Values
for which it cannot, but which have a tagged encoding, are that encoding: its first byte, the
version, tells it from a zip file. What is left is a pickle, read only by whoever allows it.

Belongs here: that choice, and the way between these bytes and stored objects. Does not belong
here: the encodings themselves (``format.object_codec``).
"""

from __future__ import annotations

import io
import pickle

import torch

from dcp_engine.errors import UnsafeContentError
from dcp_engine.format.object_codec import EncodedObject, decode_object, encode_object
from dcp_engine.format.tagged import ENCODING_VERSION

__all__ = ["from_item_bytes", "item_bytes", "read_item_bytes", "to_item_bytes"]

_TAGGED = bytes([ENCODING_VERSION])


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
        return io.BytesIO(encoded.data)
    buffer.seek(0)
    return buffer


def read_item_bytes(data: io.BytesIO, *, fqn: str, allow_pickle: bool = False) -> object:
    """The value in ``data``, from its position on.

    Raises ``UnsafeContentError(kind="pickle_refused")`` for a pickle that would run code, unless
    ``allow_pickle``; ``DamagedCheckpointError(kind="object_invalid")`` for what is neither.
    """
    encoded = from_item_bytes(data.read())
    try:
        return decode_object(encoded.data, encoded.pickled, fqn=fqn, allow_pickle=allow_pickle)
    except UnsafeContentError as error:
        error.hint = f"{error.hint}, or with planner=DefaultLoadPlanner(allow_pickle=True)"
        raise


def from_item_bytes(data: bytes) -> EncodedObject:
    """An item's bytes as the engine's format stores them. Bytes that a planner made up itself
    count as pickled: its own ``load_bytes`` gets them back unchanged, and nobody else can read
    them anyway."""
    return EncodedObject(data, pickled=not data.startswith(_TAGGED))


def to_item_bytes(stored: EncodedObject, *, fqn: str) -> io.BytesIO:
    """What a planner's ``load_bytes`` gets for ``stored``, whichever kind of planner saved it."""
    if stored.pickled or not stored.data.startswith(_TAGGED):
        return io.BytesIO(stored.data)
    return item_bytes(decode_object(stored.data, False, fqn=fqn), fqn=fqn)
