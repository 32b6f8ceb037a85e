"""``DTensor``: boxes from mesh and placements, and what contradicts them refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dcp_engine.state.adapters.checkpointable import describe_checkpointable
from dcp_engine.state.adapters.memory import plain_memory, refusal
from dcp_engine.state.adapters.mesh import Meshes, MeshPlace
from dcp_engine.state.adapters.torch_types import (
    has_checkpoint_methods,
    has_own_dispatch,
    is_async_collective,
)
from dcp_engine.state.placements import (
    REPLICATE,
    LocalPart,
    as_plain_shards,
    local_part,
    shard,
    shard_order,
    strided_shard,
)
from dcp_engine.state.values import EntryKind, MeshLayout, TensorValue, Value

__all__ = ["describe_dtensor"]


def describe_dtensor(fqn: str, value: Any, meshes: Meshes, *, for_load: bool) -> list[Value]:
    """One ``TensorValue``: REPLICATED if every placement replicates, else SHARDED.

    A rank outside the mesh gets a value without boxes.

    Raises:
        UnsupportedStateError: a ``Partial`` (or unknown) placement, a mesh that reaches outside
            the group, a local tensor whose shape is not what mesh and placements imply.
    """
    mesh, given, local = value.device_mesh, value.placements, _local(value)
    # Types too: in older versions of torch a strided shard equals a plain one.
    key = (id(mesh), value.shape, local.shape, given, *map(type, given))
    known: _Reading | None = meshes.readings.get(key)
    if known is not None and type(local) is torch.Tensor:  # most are like one before
        return [_described(fqn, value, local, known, for_load)]
    shape = tuple(value.shape)
    placements = tuple([_spell(fqn, p, len(shape)) for p in given])
    place = meshes.place(mesh)
    if place.outside:
        raise refusal(
            fqn,
            f"its mesh holds global ranks {list(place.outside[:8])}, which are not in the process "
            f"group of this operation",
            "pass a process_group= that holds the whole mesh",
        )
    if type(local) is not torch.Tensor:  # rare
        if is_async_collective(local):
            local = local.trigger_wait()
        if has_checkpoint_methods(local):
            # The local tensor knows its own chunks, which need not be what the mesh implies.
            return describe_checkpointable(
                fqn, local, shape=shape, argument=value, for_load=for_load
            )
        if has_own_dispatch(local):
            raise refusal(
                fqn,
                f"a DTensor of {type(local).__qualname__} cannot be stored: which part of the "
                "wrapped tensors a rank holds does not follow from the placements",
                "store the inner tensors, or give the class the _Checkpointable methods",
            )
    reading = meshes.readings[key] = _read(fqn, shape, tuple(local.shape), placements, place)
    return [_described(fqn, value, local, reading, for_load)]


def _described(
    fqn: str, value: Any, local: torch.Tensor, reading: _Reading, for_load: bool
) -> TensorValue:
    part = reading.part
    boxes = part.boxes
    memory = plain_memory(fqn, local, for_load=for_load) if boxes else local
    tensors: tuple[torch.Tensor, ...]
    if len(boxes) == 1 and boxes[0].sizes == part.shape:  # most are
        tensors = (memory,)
    else:
        tensors = tuple(
            _narrow(memory, within, box.sizes)
            for box, within in zip(boxes, part.within, strict=True)
        )
    return TensorValue(
        fqn=fqn,
        kind=EntryKind.REPLICATED if reading.replicated else EntryKind.SHARDED,
        dtype=local.dtype,
        shape=reading.shape,
        boxes=boxes,
        tensors=tensors,
        layout=reading.layout,
        requires_grad=value.requires_grad,
    )


def _local(value: Any) -> Any:
    if not torch.is_grad_enabled():
        return value.to_local()
    with torch.no_grad():
        return value.to_local()


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What mesh and placements are taken to mean."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    part: LocalPart
    layout: MeshLayout | None
    replicated: bool
    """Every placement replicates."""

    @staticmethod
    def make(shape: tuple[int, ...], placements: tuple[str, ...], place: MeshPlace) -> _Reading:
        part = LocalPart(shape=(0,), boxes=(), within=())
        if place.coordinate is not None:
            part = local_part(shape, place.shape, placements, place.coordinate)
        layout = None
        if place.ranks is not None:
            layout = MeshLayout(mesh_shape=place.shape, ranks=place.ranks, placements=placements)
        return _Reading(
            shape=shape, part=part, layout=layout, replicated=set(placements) <= {REPLICATE}
        )


def _read(
    fqn: str,
    shape: tuple[int, ...],
    local_shape: tuple[int, ...],
    placements: tuple[str, ...],
    place: MeshPlace,
) -> _Reading:
    """Strided shards in the order they stand for, if the local shape allows, else literally."""
    readings = [_Reading.make(shape, placements, place)]
    order = shard_order(place.shape, placements)
    if order is not None:
        plain = tuple(as_plain_shards(placements)[d] for d in order)
        readings.insert(0, _Reading.make(shape, plain, place.permuted(order)))
    if place.coordinate is None:
        return readings[0]
    fitting = [reading for reading in readings if reading.part.shape == local_shape]
    if not fitting:
        raise refusal(
            fqn,
            f"the local tensor has shape {local_shape}, but placements {list(placements)} of a "
            f"tensor of shape {shape} on a mesh of shape {place.shape} put "
            f"{readings[0].part.shape} at coordinate {place.coordinate}",
            "give from_local the shape= and stride= of the whole tensor, and shards that are cut "
            "as torch.chunk cuts",
        )
    if fitting[0].part.boxes != fitting[-1].part.boxes:
        raise refusal(
            fqn,
            f"placements {list(placements)} of a tensor of shape {shape} on a mesh of shape "
            f"{place.shape} put a local tensor of shape {local_shape} at "
            f"{fitting[0].part.boxes[0].offsets} or at {fitting[-1].part.boxes[0].offsets}, "
            "depending on the order of the cuts",
            "choose sizes that divide evenly, or redistribute to plain Shard placements",
        )
    return fitting[0]


def _spell(fqn: str, placement: Any, ndim: int) -> str:
    if placement.is_replicate():
        return REPLICATE
    if placement.is_partial():
        raise refusal(
            fqn,
            f"a DTensor with placement {placement} holds parts that are not yet reduced",
            "redistribute it to Shard or Replicate first",
        )
    # By name: the strided class is private, and older versions derive it from Shard.
    name = type(placement).__name__
    if name in ("Shard", "_StridedShard"):
        dim = int(placement.dim)
        dim += ndim if dim < 0 else 0
        if name == "Shard":
            return shard(dim)
        return strided_shard(dim, int(placement.split_factor))
    raise refusal(fqn, f"the placement {placement!r} is unknown", "redistribute the DTensor")


def _narrow(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, offset, size)
    return tensor
