"""``ShardedTensor``: boxes from the shards' own metadata, nested ones flattened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dcp_engine.state.adapters.memory import plain_memory, refusal
from dcp_engine.state.adapters.torch_types import is_dtensor, is_sharded_tensor
from dcp_engine.state.values import Box, EntryKind, TensorValue, Value

__all__ = ["describe_sharded_tensor"]


def describe_sharded_tensor(
    fqn: str, value: Any, *, flatten_sharded_tensors: bool, for_load: bool
) -> list[Value]:
    """One SHARDED ``TensorValue`` with a box for each local shard.

    A shard that is a ``ShardedTensor`` itself (FSDP over tensor parallelism) contributes its own
    shards, at the sum of both offsets, if ``flatten_sharded_tensors``.

    Raises:
        UnsupportedStateError: a nested one without the option, a shard of another shape or dtype
            than its metadata says.
    """
    metadata = value.metadata()
    shape = tuple(int(n) for n in metadata.size)
    boxes: list[Box] = []
    tensors: list[torch.Tensor] = []
    for offsets, sizes, tensor in _shards(fqn, value, (0,) * len(shape), flatten_sharded_tensors):
        memory = plain_memory(fqn, tensor, for_load=for_load)
        if tuple(memory.shape) != sizes:
            raise refusal(
                fqn,
                f"the shard at {offsets} has shape {tuple(memory.shape)}, its metadata {sizes}",
            )
        if memory.numel():
            boxes.append(Box(offsets=offsets, sizes=sizes))
            tensors.append(memory)
    dtypes = {tensor.dtype for tensor in tensors} or {metadata.tensor_properties.dtype}
    if len(dtypes) > 1:
        raise refusal(fqn, f"its shards have several dtypes: {sorted(map(str, dtypes))}")
    return [
        TensorValue(
            fqn=fqn,
            kind=EntryKind.SHARDED,
            dtype=dtypes.pop(),
            shape=shape,
            boxes=tuple(boxes),
            tensors=tuple(tensors),
            requires_grad=bool(metadata.tensor_properties.requires_grad),
        )
    ]


def _shards(
    fqn: str, value: Any, base: tuple[int, ...], flatten: bool
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    for item in value.local_shards():
        offsets = tuple(b + int(o) for b, o in zip(base, item.metadata.shard_offsets, strict=True))
        if is_sharded_tensor(item.tensor):
            if not flatten:
                raise refusal(
                    fqn,
                    "a ShardedTensor of ShardedTensors cannot be stored as it is",
                    "use a planner with flatten_sharded_tensors=True",
                )
            yield from _shards(fqn, item.tensor, offsets, flatten)
        elif is_dtensor(item.tensor):
            raise refusal(fqn, "a ShardedTensor of DTensors cannot be stored")
        else:
            yield offsets, tuple(int(n) for n in item.metadata.shard_sizes), item.tensor
