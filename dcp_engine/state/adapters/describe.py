"""The leaves of a state dict as the values they consist of: the choice of the adapter.

The same functions describe what a save stores and, with ``for_load``, the memory that a load
fills in place: then every ``TensorValue.tensors`` shares memory with the caller's tensor, or the
value is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.state.adapters.checkpointable import describe_checkpointable
from dcp_engine.state.adapters.dtensor import describe_dtensor
from dcp_engine.state.adapters.group import GroupRanks
from dcp_engine.state.adapters.memory import is_simple, plain_memory, refusal
from dcp_engine.state.adapters.mesh import Meshes
from dcp_engine.state.adapters.sharded_tensor import describe_sharded_tensor
from dcp_engine.state.adapters.torch_types import (
    has_checkpoint_methods,
    is_async_collective,
    is_dtensor,
    is_fake,
    is_sharded_tensor,
)
from dcp_engine.state.adapters.wrapper import FLATTEN_KEY, is_wrapper, open_wrapper
from dcp_engine.state.flatten import Leaf
from dcp_engine.state.values import Box, EntryKind, ObjectValue, TensorValue, Value

__all__ = ["describe", "describe_leaves"]


def describe_leaves(
    leaves: Iterable[Leaf],
    *,
    group: GroupRanks,
    flatten_sharded_tensors: bool = True,
    for_load: bool = False,
) -> list[tuple[Leaf, list[Value]]]:
    """Describe every leaf of a flattened state dict; see ``describe``.

    Raises:
        UnsupportedStateError: also when the parts of a leaf (``<fqn>.<attribute>``) take the name
            of another value (``kind="duplicate_key"``).
    """
    with torch.no_grad():  # once: each entry is 2 us
        described, has_parts = _described(leaves, group, flatten_sharded_tensors, for_load)
    if has_parts:
        _refuse_taken_names(described, group.rank)
    return described


def _described(
    leaves: Iterable[Leaf], group: GroupRanks, flatten_sharded_tensors: bool, for_load: bool
) -> tuple[list[tuple[Leaf, list[Value]]], bool]:
    """What ``describe_leaves`` returns, and whether some leaf has values of other names."""
    meshes = Meshes(group=group)
    plain = _PlainTensors()
    result: list[tuple[Leaf, list[Value]]] = []
    has_parts = False
    for leaf in leaves:
        value = leaf.value
        kind = EntryKind.PER_RANK if leaf.per_rank else EntryKind.REPLICATED
        if type(value) is torch.Tensor and is_simple(value):  # most are: spare them the questions
            result.append((leaf, [plain.describe(leaf.fqn, value, kind)]))
            continue
        values = _describe(leaf.fqn, value, kind, meshes, flatten_sharded_tensors, for_load)
        has_parts = has_parts or len(values) != 1 or values[0].fqn != leaf.fqn
        result.append((leaf, values))
    return result, has_parts


class _PlainTensors:
    """Whole tensors of memory that needs no question; equal shapes share their boxes."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[int, ...], tuple[tuple[int, ...], tuple[Box, ...]]] = {}

    def describe(self, fqn: str, tensor: torch.Tensor, kind: EntryKind) -> TensorValue:
        """``_whole`` in half the time."""
        size = tensor.shape
        known = self._boxes.get(size)
        if known is None:
            shape = tuple(size)
            box = Box(offsets=(0,) * len(shape), sizes=shape)
            known = self._boxes[shape] = (shape, () if 0 in shape else (box,))
        shape, boxes = known
        grad = tensor.requires_grad
        return TensorValue(
            fqn=fqn,
            kind=kind,
            dtype=tensor.dtype,
            shape=shape,
            boxes=boxes,
            tensors=((tensor.detach() if grad else tensor),) if boxes else (),
            requires_grad=grad,
        )


def _refuse_taken_names(described: Iterable[tuple[Leaf, list[Value]]], rank: int) -> None:
    """Parts of a leaf must not take the name of another value."""
    owner: dict[str, Leaf] = {}
    for leaf, values in described:
        for value in values:
            other = owner.setdefault(value.fqn, leaf)
            if other is not leaf:
                raise UnsupportedStateError(
                    f"parts of the values at {list(other.path)} and {list(leaf.path)} would both "
                    f"be stored as {value.fqn!r}",
                    kind="duplicate_key",
                    tensor=value.fqn,
                    rank=rank,
                    hint="rename one of the keys",
                )


def describe(
    fqn: str,
    value: Any,
    *,
    kind: EntryKind,
    group: GroupRanks,
    flatten_sharded_tensors: bool = True,
    for_load: bool = False,
) -> list[Value]:
    """Describe one leaf.

    Args:
        fqn: its fully qualified name.
        kind: PER_RANK for a leaf below ``PerRank``, else REPLICATED; sharded types are SHARDED
            by themselves.
        group: the ranks of the operation, which ``DTensor`` meshes must lie in.
        flatten_sharded_tensors: whether a ``ShardedTensor`` of ``ShardedTensor`` is taken apart,
            as in torch's DCP.
        for_load: describe a destination, to be filled in place, instead of a source.
    Returns:
        Usually one value; several for a wrapper subclass; none for a ``_Checkpointable`` value
        that has nothing on this rank.
    Raises:
        UnsupportedStateError: naming ``fqn`` and the rank.
    """
    meshes = Meshes(group=group)
    return _describe(fqn, value, kind, meshes, flatten_sharded_tensors, for_load)


def _describe(
    fqn: str, value: Any, kind: EntryKind, meshes: Meshes, flatten_sharded: bool, for_load: bool
) -> list[Value]:
    try:
        if type(value) is torch.Tensor:
            return [_whole(fqn, value, kind, for_load=for_load)]
        if kind is EntryKind.PER_RANK and _is_sharded(value):
            raise refusal(
                fqn,
                f"a {type(value).__name__} is sharded; it cannot be every rank's own",
                "take it out of PerRank",
            )
        if is_dtensor(value):
            return describe_dtensor(fqn, value, meshes, for_load=for_load)
        if is_sharded_tensor(value):
            return describe_sharded_tensor(
                fqn, value, flatten_sharded_tensors=flatten_sharded, for_load=for_load
            )
        if has_checkpoint_methods(value):
            return describe_checkpointable(fqn, value, for_load=for_load)
        if not isinstance(value, torch.Tensor):
            return [ObjectValue(fqn=fqn, kind=kind, value=value)]
        if is_wrapper(value) and not is_fake(value) and not is_async_collective(value):
            wrapper = open_wrapper(value)
            values: list[Value] = [
                ObjectValue(fqn=f"{fqn}.{FLATTEN_KEY}", kind=kind, value=wrapper.description)
            ]
            for name, inner in wrapper.inner.items():
                below = f"{fqn}.{name}"
                values += _describe(below, inner, kind, meshes, flatten_sharded, for_load)
            return values
        return [_whole(fqn, value, kind, for_load=for_load)]
    except UnsupportedStateError as error:
        error.with_context(rank=meshes.group.rank)
        raise


def _is_sharded(value: Any) -> bool:
    return is_dtensor(value) or is_sharded_tensor(value) or has_checkpoint_methods(value)


def _whole(fqn: str, value: torch.Tensor, kind: EntryKind, *, for_load: bool) -> TensorValue:
    memory = plain_memory(fqn, value, for_load=for_load)
    shape = tuple(memory.shape)
    filled = memory.numel() > 0
    return TensorValue(
        fqn=fqn,
        kind=kind,
        dtype=memory.dtype,
        shape=shape,
        boxes=(Box(offsets=(0,) * len(shape), sizes=shape),) if filled else (),
        tensors=(memory,) if filled else (),
        requires_grad=bool(value.requires_grad),
    )
