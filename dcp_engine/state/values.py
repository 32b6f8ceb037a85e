"""What one rank holds under one key, described without I/O: the result of ``state.adapters``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import msgspec
import torch

__all__ = ["Box", "EntryKind", "MeshLayout", "ObjectValue", "TensorValue", "Value"]


class EntryKind(IntEnum):
    """How the ranks' values under one key relate."""

    REPLICATED = 0
    """Every rank that has the key holds the same whole value."""
    SHARDED = 1
    """Boxes that together tile the global shape; several ranks may hold the same box."""
    PER_RANK = 2
    """Every rank's own value, restored to the same rank."""


class Box(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A box of a tensor, in elements: one offset and one size per dimension.

    A struct, as ``TensorValue``: five times faster to make than a frozen data class, and there
    may be a hundred thousand.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MeshLayout:
    """Which ranks (of the process group of the operation) hold which part: enough to derive the
    boxes of all ranks. ``ranks`` is the mesh, row by row; ``mesh_shape`` its shape;
    ``placements`` one string per mesh dimension, as ``state.adapters`` spells them."""

    mesh_shape: tuple[int, ...]
    ranks: tuple[int, ...]
    placements: tuple[str, ...]


class TensorValue(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A tensor, or this rank's part of one.

    ``boxes[i]`` says which box of the global ``shape`` the plain strided tensor ``tensors[i]``
    holds (``tensors[i].shape == boxes[i].sizes``; any strides, any device). Empty boxes are left
    out: a rank that holds nothing has no boxes. On load the same tensors are the destination.
    """

    fqn: str
    kind: EntryKind
    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    tensors: tuple[torch.Tensor, ...]
    layout: MeshLayout | None = None
    requires_grad: bool = False


@dataclass(frozen=True, kw_only=True)
class ObjectValue:
    """A value that is not a tensor. ``kind`` is REPLICATED or PER_RANK."""

    fqn: str
    kind: EntryKind
    value: object


Value = TensorValue | ObjectValue
