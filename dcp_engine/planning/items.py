"""Between described values, columns and items: for planners, writers and readers of other origin.

Items of torch's DCP, which tensor types that describe themselves hand out, are read by attribute
and become the engine's. Belongs here: conversions. Does not belong here: plans over all ranks
(``item_plans``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dcp_engine.errors import DamagedCheckpointError, StateMismatchError
from dcp_engine.format.dtypes import info
from dcp_engine.geometry.boxes import find_overlaps
from dcp_engine.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from dcp_engine.plan import (
    BytesIOWriteData,
    LoadItemType,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from dcp_engine.planning.columns import I64, LocalPlan
from dcp_engine.state.values import Box, EntryKind, TensorValue, Value

__all__ = [
    "bytes_read_item",
    "own_save_plan",
    "own_write_item",
    "read_items",
    "stored_nbytes",
    "value_items",
    "write_items",
]


def value_items(value: Value) -> list[WriteItem]:
    """What a save writes of one described value: an item per box, or one for bytes.

    A tensor without elements is one item of its own shape, so that its name is not lost.
    """
    if not isinstance(value, TensorValue):
        return [WriteItem(index=MetadataIndex(value.fqn), type=WriteItemType.BYTE_IO)]
    boxes = value.boxes
    if math.prod(value.shape) == 0:
        boxes = (Box(offsets=(0,) * len(value.shape), sizes=value.shape),)
    return [
        _tensor_item(
            value.fqn,
            value.kind,
            value.dtype,
            value.shape,
            box,
            requires_grad=value.requires_grad,
        )
        for box in boxes
    ]


def write_items(plan: LocalPlan) -> list[WriteItem]:
    """A local plan as items: its chunks in order, then its objects."""
    table, chunks = plan.tensors, plan.chunks
    items = []
    for row, offsets, sizes in zip(
        chunks.tensor.tolist(), chunks.offsets.tolist(), chunks.sizes.tolist(), strict=True
    ):
        ndim = int(table.ndims[row])
        items.append(
            _tensor_item(
                table.names[row],
                EntryKind(int(table.kinds[row])),
                info(int(table.dtypes[row])).dtype,
                tuple(table.shapes[row, :ndim].tolist()),
                Box(offsets=tuple(offsets[:ndim]), sizes=tuple(sizes[:ndim])),
                requires_grad=False,
            )
        )
    items += [
        WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)
        for name in plan.objects.names
    ]
    return items


def _tensor_item(
    fqn: str,
    kind: EntryKind,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    box: Box,
    *,
    requires_grad: bool,
) -> WriteItem:
    sharded = kind is EntryKind.SHARDED
    return WriteItem(
        index=MetadataIndex(fqn, box.offsets),
        type=WriteItemType.SHARD if sharded else WriteItemType.TENSOR,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(
                offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes)
            ),
            # One object per item: planners change the dtype of an item in place.
            properties=TensorProperties(dtype=dtype, requires_grad=requires_grad),
            size=torch.Size(shape),
        ),
    )


def own_write_item(item: Any) -> WriteItem:
    """``item``, of the engine's class or a look-alike (torch's), as the engine's."""
    if isinstance(item, WriteItem):
        return item
    tensor, size = item.tensor_data, item.bytes_io_data
    return WriteItem(
        index=MetadataIndex(item.index.fqn, item.index.offset, item.index.index),
        type=WriteItemType[item.type.name],
        bytes_io_data=None if size is None else BytesIOWriteData(nbytes=size.nbytes),
        tensor_data=None
        if tensor is None
        else TensorWriteData(
            chunk=ChunkStorageMetadata(
                offsets=torch.Size(tensor.chunk.offsets), sizes=torch.Size(tensor.chunk.sizes)
            ),
            properties=TensorProperties(
                dtype=tensor.properties.dtype,
                layout=tensor.properties.layout,
                requires_grad=tensor.properties.requires_grad,
                memory_format=tensor.properties.memory_format,
                pin_memory=tensor.properties.pin_memory,
            ),
            size=torch.Size(tensor.size),
        ),
    )


def own_save_plan(plan: Any) -> SavePlan:
    """``plan`` with the engine's own items."""
    if not isinstance(plan, SavePlan):
        return SavePlan(
            items=[own_write_item(item) for item in plan.items],
            storage_data=plan.storage_data,
            planner_data=plan.planner_data,
            usable=getattr(plan, "usable", True),
        )
    if all(isinstance(item, WriteItem) for item in plan.items):
        return plan
    return replace(plan, items=[own_write_item(item) for item in plan.items])


def stored_nbytes(item: WriteItem) -> int:
    """Bytes that ``item`` itself writes; 0 for bytes of unknown size."""
    if item.tensor_data is None:
        return item.bytes_io_data.nbytes if item.bytes_io_data is not None else 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def bytes_read_item(fqn: str) -> ReadItem:
    """The request for an object."""
    index, nothing = MetadataIndex(fqn), torch.Size((0,))
    return ReadItem(
        type=LoadItemType.BYTE_IO,
        dest_index=index,
        dest_offsets=nothing,
        storage_index=index,
        storage_offsets=nothing,
        lengths=nothing,
    )


def read_items(value: TensorValue, stored: Any) -> list[ReadItem]:
    """The parts of ``stored`` (``TensorStorageMetadata`` or a look-alike) that fill the boxes of
    ``value``, box by box.

    Raises ``StateMismatchError(kind="shape_mismatch")`` for another shape, and
    ``DamagedCheckpointError`` if the chunks do not cover a box exactly once.
    """
    ndim = len(value.shape)
    if tuple(stored.size) != tuple(value.shape):
        raise StateMismatchError(
            f"the destination has shape {list(value.shape)}, the checkpoint {list(stored.size)}",
            kind="shape_mismatch",
            tensor=value.fqn,
            hint="build the model as it was saved",
        )
    offsets = _matrix([box.offsets for box in value.boxes], ndim)
    sizes = _matrix([box.sizes for box in value.boxes], ndim)
    chunk_offsets = _matrix([chunk.offsets for chunk in stored.chunks], ndim)
    chunk_sizes = _matrix([chunk.sizes for chunk in stored.chunks], ndim)
    boxes, chunks = find_overlaps(offsets, sizes, chunk_offsets, chunk_sizes)
    begin = np.maximum(offsets[boxes], chunk_offsets[chunks])
    end = np.minimum((offsets + sizes)[boxes], (chunk_offsets + chunk_sizes)[chunks])
    lengths = end - begin
    volume = np.bincount(boxes, weights=lengths.prod(axis=1), minlength=len(value.boxes))
    if (volume != sizes.prod(axis=1)).any():
        raise DamagedCheckpointError(
            "the stored chunks do not cover the destination exactly once", tensor=value.fqn
        )
    return [
        ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(value.fqn, value.boxes[box].offsets, box),
            dest_offsets=torch.Size(in_box),
            storage_index=MetadataIndex(value.fqn, stored.chunks[chunk].offsets, chunk),
            storage_offsets=torch.Size(in_chunk),
            lengths=torch.Size(length),
        )
        for box, chunk, in_box, in_chunk, length in zip(
            boxes.tolist(),
            chunks.tolist(),
            (begin - offsets[boxes]).tolist(),
            (begin - chunk_offsets[chunks]).tolist(),
            lengths.tolist(),
            strict=True,
        )
    ]


def _matrix(rows: Sequence[Iterable[int]], ndim: int) -> I64:
    return np.array([tuple(row) for row in rows], np.int64).reshape(len(rows), ndim)
