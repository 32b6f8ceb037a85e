"""Values that describe themselves through torch's ``_Checkpointable`` methods.

``__create_write_items__(fqn, object)`` says what a save writes, ``__create_chunk_list__()`` what
a load wants, ``__get_tensor_shard__(index)`` hands out the memory. Items and chunks come in
whatever class the value's author used (torch's DCP, ours, a look-alike): attributes are read, the
class is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dcp_engine.metadata import MetadataIndex
from dcp_engine.state.adapters.memory import plain_memory, refusal
from dcp_engine.state.values import Box, EntryKind, ObjectValue, TensorValue, Value

__all__ = ["describe_checkpointable"]

_Part = tuple[Box, torch.Tensor]


def describe_checkpointable(
    fqn: str,
    value: Any,
    *,
    for_load: bool,
    shape: tuple[int, ...] | None = None,
    argument: Any = None,
) -> list[Value]:
    """What ``value`` says of itself: a SHARDED ``TensorValue`` for each name in its items.

    A rank on which it says nothing gets no value; the others' items stand for the key.

    Args:
        shape: of the whole tensor, where a ``DTensor`` around ``value`` knows it.
        argument: what the methods are told is being stored, unless ``value`` itself.
    Raises:
        UnsupportedStateError: items that contradict each other or the memory handed out.
    """
    if for_load and hasattr(type(value), "__create_chunk_list__"):
        return _destination(fqn, value, shape)
    items = value.__create_write_items__(fqn, value if argument is None else argument)
    by_name: dict[str, list[Any]] = {}
    for item in items:
        by_name.setdefault(item.index.fqn, []).append(item)
    result: list[Value] = []
    for name, group in by_name.items():
        if any(item.tensor_data is None for item in group):
            if len(group) > 1 or name != fqn:
                raise refusal(fqn, f"its write items for {name!r} hold bytes that cannot be found")
            result.append(ObjectValue(fqn=fqn, kind=EntryKind.REPLICATED, value=value))
            continue
        if for_load:
            raise refusal(fqn, f"a {type(value).__qualname__} lacks __create_chunk_list__")
        result.append(_source(fqn, name, value, group))
    return result


def _source(fqn: str, name: str, value: Any, items: Sequence[Any]) -> TensorValue:
    shapes = {tuple(int(n) for n in item.tensor_data.size) for item in items}
    if len(shapes) > 1:
        raise refusal(fqn, f"its write items disagree about the global shape: {sorted(shapes)}")
    parts = [
        _part(fqn, value, item.index, item.tensor_data.chunk, for_load=False)
        for item in items
        if math.prod(item.tensor_data.chunk.sizes)
    ]
    dtype = items[0].tensor_data.properties.dtype
    grad = bool(items[0].tensor_data.properties.requires_grad)
    return _value(fqn, name, shapes.pop(), dtype, parts, requires_grad=grad)


def _destination(fqn: str, value: Any, shape: tuple[int, ...] | None) -> list[Value]:
    parts = [
        _part(fqn, value, MetadataIndex(fqn, chunk.offsets, i), chunk, for_load=True)
        for i, chunk in enumerate(value.__create_chunk_list__())
        if math.prod(chunk.sizes)
    ]
    if not parts:
        return []
    if shape is None:
        shape = _global_shape(fqn, value)
    return [_value(fqn, fqn, shape, parts[0][1].dtype, parts, requires_grad=False)]


def _global_shape(fqn: str, value: Any) -> tuple[int, ...]:
    """What the save would call the global shape; a value's own shape may be a local one."""
    for item in value.__create_write_items__(fqn, value):
        if item.tensor_data is not None:
            return tuple(int(n) for n in item.tensor_data.size)
    return tuple(int(n) for n in value.shape)


def _part(fqn: str, value: Any, index: Any, chunk: Any, *, for_load: bool) -> _Part:
    if not hasattr(type(value), "__get_tensor_shard__"):
        raise refusal(fqn, f"a {type(value).__qualname__} lacks __get_tensor_shard__")
    box = Box(
        offsets=tuple(int(n) for n in chunk.offsets), sizes=tuple(int(n) for n in chunk.sizes)
    )
    memory = plain_memory(fqn, value.__get_tensor_shard__(index), for_load=for_load)
    if tuple(memory.shape) != box.sizes:
        raise refusal(
            fqn,
            f"its chunk at {box.offsets} is said to have shape {box.sizes}, but "
            f"__get_tensor_shard__ gives {tuple(memory.shape)}",
        )
    return box, memory


def _value(
    fqn: str,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parts: Iterable[_Part],
    *,
    requires_grad: bool,
) -> TensorValue:
    parts = list(parts)
    # The memory is the truth; properties are often left at their defaults.
    dtypes = {memory.dtype for _, memory in parts} or {dtype}
    if len(dtypes) > 1:
        raise refusal(fqn, f"its chunks have several dtypes: {sorted(map(str, dtypes))}")
    for box, _ in parts:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            raise refusal(fqn, f"the chunk at {box.offsets} does not fit the shape {shape}")
    return TensorValue(
        fqn=name,
        kind=EntryKind.SHARDED,
        dtype=dtypes.pop(),
        shape=shape,
        boxes=tuple(box for box, _ in parts),
        tensors=tuple(memory for _, memory in parts),
        requires_grad=requires_grad,
    )
