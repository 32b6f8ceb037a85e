"""A state dict, taken apart for staging and put together again of staged values.

Belongs here: which values are copied to the arena, what stands for them afterwards, and deep
copies of objects. Does not belong here: copying tensors (``copier``), sending the result to
another process (``staged_pickle``).

In the result, which saves to the same checkpoint as the original:
- containers are dicts, lists and tuples, and ``PerRank`` marks lie on leaves;
- tensors are contiguous views into the arena; a ``DTensor`` that is replicated everywhere is a
  plain tensor; what else is sharded is a ``StagedShards``;
- a wrapper subclass is an ``OpenedWrapper``, whose inner values are these;
- objects are deep copies.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from msgspec.structs import replace

from dcp_engine.collector import collector_paused
from dcp_engine.errors import UnsupportedStateError
from dcp_engine.format.object_codec import decode_object, encode_object
from dcp_engine.staging.arena_stager import Sources
from dcp_engine.staging.stand_in import StagedShards
from dcp_engine.staging.versions import outer_tensors
from dcp_engine.state.adapters import FLATTEN_KEY, GroupRanks, describe_leaves
from dcp_engine.state.adapters.wrapper import OpenedWrapper, Wrapper
from dcp_engine.state.flatten import FlatState, Leaf, flatten, resolve_stateful, unflatten
from dcp_engine.state.per_rank import PerRank
from dcp_engine.state.values import EntryKind, ObjectValue, TensorValue, Value

__all__ = ["DescribedState", "describe_state"]

_IMMUTABLE = frozenset({int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.Size})


@dataclass(frozen=True, kw_only=True, eq=False)
class DescribedState:
    """A state dict, its tensors listed and its objects copied already."""

    sources: Sources
    """All tensors, to be staged row by row."""
    _flat: FlatState
    _leaves: Sequence[tuple[Leaf, Sequence[Value]]]
    """Their objects are copies."""

    @collector_paused()
    def build(self, staged: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The staged state dict; ``staged[i]`` stands for row ``i`` of ``sources``."""
        values: dict[str, Any] = {}
        at = 0
        for leaf, described in self._leaves:
            count = sum(len(v.tensors) for v in described if isinstance(v, TensorValue))
            value = _staged_leaf(leaf, described, staged[at : at + count])
            at += count
            values[leaf.fqn] = PerRank(value) if leaf.per_rank else value
        return unflatten(values, self._flat.mappings, self._flat.containers)


@collector_paused()
def describe_state(
    state_dict: Mapping[str, Any],
    *,
    group: GroupRanks | None = None,
    flatten_state_dict: bool = True,
    flatten_sharded_tensors: bool = True,
) -> DescribedState:
    """Take ``state_dict`` apart; ``Stateful`` values are asked for their state, objects copied.

    Args:
        group: the ranks of the save, which meshes must lie in; None leaves that question open.
        flatten_state_dict, flatten_sharded_tensors: as the planner of the save has them.
            Without ``flatten_state_dict`` containers are objects, their tensors with them.
    Raises:
        UnsupportedStateError: naming the key, for what a save would refuse.
    """
    resolved, _ = resolve_stateful(state_dict)
    flat = flatten(resolved, flatten_state_dict=flatten_state_dict)
    leaves = [
        (leaf, [_with_copied_object(value) for value in values])
        for leaf, values in describe_leaves(
            flat.leaves,
            group=group if group is not None else GroupRanks(),
            flatten_sharded_tensors=flatten_sharded_tensors,
        )
    ]
    tensors = [
        (value.fqn, tensor)
        for _, values in leaves
        for value in values
        if isinstance(value, TensorValue)
        for tensor in value.tensors
    ]
    return DescribedState(
        sources=Sources(
            tensors=[tensor for _, tensor in tensors],
            names=[name for name, _ in tensors],
            watched=outer_tensors(flat.leaves),
        ),
        _flat=flat,
        _leaves=leaves,
    )


def _with_copied_object(value: Value) -> Value:
    if isinstance(value, TensorValue):
        return value
    return ObjectValue(fqn=value.fqn, kind=value.kind, value=_copied(value.value, value.fqn))


def _copied(value: object, fqn: str) -> object:
    """``value``, sharing nothing that could change.

    What cannot be copied (a tensor with a history, say) may still be storable: then it is what a
    load would make of it. Raises ``UnsupportedStateError`` for what is neither.
    """
    if type(value) in _IMMUTABLE:
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever a __deepcopy__ raises; encode_object says what is wrong
        encoded = encode_object(value, fqn=fqn)
    return decode_object(encoded.data, encoded.pickled, fqn=fqn, allow_pickle=True)


def _staged_leaf(leaf: Leaf, described: Sequence[Value], staged: Sequence[torch.Tensor]) -> Any:
    """What stands for ``leaf``; ``staged`` has the tensors of all its values."""
    if described and described[0].fqn == f"{leaf.fqn}.{FLATTEN_KEY}":
        return _staged_wrapper(leaf.fqn, _with_staged(described, staged))
    if len(described) == 1:
        return _staged_value(described[0], staged, leaf.value)
    values = [value for value in described if isinstance(value, TensorValue)]
    if len(values) < len(described):
        raise UnsupportedStateError(
            f"a {type(leaf.value).__qualname__} that is stored partly as bytes cannot be staged",
            tensor=leaf.fqn,
        )
    return _stand_in(leaf.fqn, leaf.value, values, staged)


def _staged_wrapper(fqn: str, values: Mapping[str, tuple[Value, Sequence[torch.Tensor]]]) -> Any:
    """What stands for the wrapper subclass ``fqn``; ``values`` has its parts by name."""
    described = cast(ObjectValue, values[f"{fqn}.{FLATTEN_KEY}"][0])
    description = cast(dict[str, Any], described.value)
    inner: dict[str, Any] = {}
    for name in description["attributes"]:
        below = f"{fqn}.{name}"
        if f"{below}.{FLATTEN_KEY}" in values:
            inner[name] = _staged_wrapper(below, values)
        elif below in values:
            inner[name] = _staged_value(*values[below], None)
        else:  # describes itself, under names of its own or not at all on this rank
            own = [found for key, found in values.items() if key.startswith(below)]
            tensors = [tensor for _, staged in own for tensor in staged]
            parts = [value for value, _ in own if isinstance(value, TensorValue)]
            inner[name] = _stand_in(below, None, parts, tensors)
    return OpenedWrapper(Wrapper(inner=inner, description=description))


def _with_staged(
    described: Sequence[Value], staged: Sequence[torch.Tensor]
) -> dict[str, tuple[Value, Sequence[torch.Tensor]]]:
    result = {}
    at = 0
    for value in described:
        count = len(value.tensors) if isinstance(value, TensorValue) else 0
        result[value.fqn] = value, staged[at : at + count]
        at += count
    return result


def _staged_value(value: Value, staged: Sequence[torch.Tensor], original: Any) -> Any:
    if isinstance(value, ObjectValue):
        return value.value
    empty = math.prod(value.shape) == 0
    if value.kind is EntryKind.SHARDED or not (staged or empty):
        return _stand_in(value.fqn, original, [value], staged)
    tensor = staged[0] if not empty else torch.empty(value.shape, dtype=value.dtype, device="cpu")
    return tensor.requires_grad_() if value.requires_grad else tensor


def _stand_in(
    fqn: str, original: Any, values: Sequence[TensorValue], staged: Sequence[torch.Tensor]
) -> StagedShards:
    parts = []
    for value in values:
        count = len(value.tensors)
        # The mesh means nothing to other processes, and items do not carry it.
        part = replace(value, tensors=tuple(staged[:count]), layout=None)
        parts.append((value.fqn.removeprefix(fqn), part))
        staged = staged[count:]
    shape: tuple[int, ...] = (0,)
    dtype, grad = torch.float32, False
    if values:
        shape, dtype, grad = values[0].shape, values[0].dtype, values[0].requires_grad
    elif isinstance(original, torch.Tensor):
        shape, dtype = tuple(original.shape), original.dtype
    return StagedShards(shape, dtype, grad, parts)
