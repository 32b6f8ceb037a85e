"""The encoded objects of a state as one tensor, which is staged like any other.

Sizes and marks come first, so that a worker needs to be told nothing but the names, which it knows
from save to save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dcp_engine.format.object_codec import EncodedObject

__all__ = ["pack_objects", "unpack_objects"]

_GRAIN = 4096
_HEAD = np.dtype([("size", "<i8"), ("pickled", "?")])


def pack_objects(names: Sequence[str], objects: Mapping[str, EncodedObject]) -> torch.Tensor:
    """The objects called ``names``, in this order: (N,) uint8, padded so that the places of tensors
    do not change with the length of an object."""
    head = np.array([(len(objects[n].data), objects[n].pickled) for n in names], _HEAD)
    data = b"".join([head.tobytes(), *(objects[name].data for name in names)])
    size = _GRAIN
    while size < len(data):
        size *= 2
    return torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)


def unpack_objects(names: Sequence[str], blob: bytes) -> dict[str, EncodedObject]:
    """What ``pack_objects`` was given."""
    head = np.frombuffer(blob, _HEAD, count=len(names))
    objects = {}
    at = head.nbytes
    for name, (size, pickled) in zip(names, head.tolist(), strict=True):
        objects[name] = EncodedObject(blob[at : at + size], pickled=pickled)
        at += size
    return objects
