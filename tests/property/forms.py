"""The forms in which ranks hold one tensor, built and checked on any rank of a simulated job.

Parts are cut by torch's own placements out of whole tensors, not by the engine's geometry. A mesh
that is told its rank needs no process group, so these are real DTensors on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_engine.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from dcp_engine.plan import TensorWriteData, WriteItem, WriteItemType
from tests.meshes import dtensor_on, mesh_seen_by
from tests.property.bytes_of import Memory, Place, place

__all__ = ["Boxes", "Form", "Held", "Sharded", "Tiled", "Whole"]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank holds of a tensor. ``value`` is what stands in the state dict."""

    value: Any
    places: tuple[Place, ...]
    expected: tuple[torch.Tensor, ...]
    """Raw content of each place."""

    def differs(self) -> str | None:
        """What is wrong with the content, if anything. Destroys it."""
        for got, expected in zip(self.places, self.expected, strict=True):
            if not torch.equal(got.raw, expected):
                return "other values"
            if not got.is_intact():
                return "memory beside the destination was written"
        return None


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A plain tensor on some of the ranks."""

    holders: frozenset[int]
    memory: Memory = "contiguous"

    def on(
        self, rank: int, first_global: int, raw: torch.Tensor, dtype: torch.dtype, filling: Any
    ) -> Held | None:
        """What ``rank`` holds; None if it does not have the key."""
        if rank not in self.holders:
            return None
        at = place(filling(raw), dtype, self.memory)
        return Held(value=at.tensor, places=(at,), expected=(raw,))


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """A DTensor, which every rank of the job has, also those outside its mesh."""

    mesh: tuple[int, ...]
    ranks: tuple[int, ...]
    """In the group, row by row."""
    placements: tuple[Placement, ...]
    order: tuple[int, ...]
    """In which order the mesh dimensions cut: another one than theirs with strided shards."""
    memory: Memory = "contiguous"

    def on(
        self, rank: int, first_global: int, raw: torch.Tensor, dtype: torch.dtype, filling: Any
    ) -> Held | None:
        """What ``rank`` holds."""
        mesh = mesh_seen_by(
            rank + first_global, (torch.tensor(self.ranks) + first_global).reshape(self.mesh)
        )
        shape = raw.shape[:-1]
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            local, inside = raw.new_empty((0, raw.shape[-1])), False
        else:
            local, inside = self.cut(raw, coordinate), True
        at = place(filling(local), dtype, self.memory if inside else "contiguous")
        value = dtensor_on(mesh, self.placements, at.tensor, shape)
        return Held(value=value, places=(at,), expected=(local,))

    def cut(self, raw: torch.Tensor, coordinate: Sequence[int]) -> torch.Tensor:
        """The part at a coordinate of the mesh."""
        for dim in self.order:
            placement = self.placements[dim]
            if placement.is_replicate():
                continue
            parts, _ = Shard(placement.dim)._split_tensor(
                raw, self.mesh[dim], with_padding=False, contiguous=False
            )
            raw = parts[coordinate[dim]]
        return raw

    def is_ambiguous(self, shape: tuple[int, ...]) -> bool:
        """Whether reading the strided shards literally, from left to right, gives a rank a part of
        the same shape at another place: then nobody can tell which is meant."""
        if self.order == tuple(range(len(self.mesh))):
            return False
        numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
        for coordinate in torch.cartesian_prod(*map(torch.arange, self.mesh), torch.arange(1)):
            at = coordinate.tolist()[:-1]
            literal = numbers
            for dim, placement in enumerate(self.placements):
                literal = _literally(literal, placement, self.mesh[dim], at[dim])
            true = self.cut(numbers.unsqueeze(-1), at).squeeze(-1)
            if literal.shape == true.shape and not torch.equal(literal, true):
                return True
        return False


def _literally(tensor: torch.Tensor, placement: Placement, ranks: int, index: int) -> torch.Tensor:
    if isinstance(placement, Replicate):
        return tensor
    pieces = (tensor,)
    if isinstance(placement, _StridedShard):
        pieces = tensor.chunk(placement.split_factor, placement.dim)
    mine = []
    for piece in pieces:
        parts = piece.chunk(ranks, placement.dim)
        mine.append(parts[index] if index < len(parts) else piece.narrow(placement.dim, 0, 0))
    return torch.cat(mine, placement.dim)


class Tiled:
    """Describes itself by boxes, through torch's ``_Checkpointable`` methods; not a tensor."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, parts: Sequence[tuple[Box, torch.Tensor]]
    ) -> None:
        self.shape = torch.Size(shape)
        self._dtype = dtype
        self._parts = list(parts)

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets, i),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self._dtype), self.shape),
            )
            for i, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for (offsets, sizes), _ in self._parts
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        for (offsets, _), tensor in self._parts:
            if offsets == tuple(index.offset):
                return tensor
        raise KeyError(index)


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Any boxes that tile the tensor, each on one rank or on several."""

    shape: tuple[int, ...]
    parts: tuple[tuple[Box, frozenset[int]], ...] = field(repr=True)
    memory: Memory = "contiguous"

    def on(
        self, rank: int, first_global: int, raw: torch.Tensor, dtype: torch.dtype, filling: Any
    ) -> Held | None:
        """What ``rank`` holds; None if it has no box."""
        mine: list[tuple[Box, Place]] = []
        expected: list[torch.Tensor] = []
        for (offsets, sizes), holders in self.parts:
            if rank not in holders:
                continue
            part = raw
            for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(dim, offset, size)
            mine.append(((offsets, sizes), place(filling(part), dtype, self.memory)))
            expected.append(part)
        if not mine:
            return None
        value = Tiled(self.shape, dtype, [(box, at.tensor) for box, at in mine])
        return Held(value=value, places=tuple(at for _, at in mine), expected=tuple(expected))


Form = Whole | Sharded | Boxes
