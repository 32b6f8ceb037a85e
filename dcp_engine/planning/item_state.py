"""A flat state dict as planners of items see it: what it offers, what it wants, where a shard is.

Belongs here: what ``default_planner`` does to the state dict of one rank. Does not belong here:
what concerns all ranks (``item_plans``).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from dcp_engine.errors import StateMismatchError, UnsupportedStateError, UsageError
from dcp_engine.metadata import Metadata, MetadataIndex
from dcp_engine.plan import ReadItem, WriteItem
from dcp_engine.planning.items import bytes_read_item, read_items, value_items
from dcp_engine.planning.missing_keys import missing_key
from dcp_engine.state.adapters import FLATTEN_KEY, GroupRanks, describe
from dcp_engine.state.adapters.torch_types import has_checkpoint_methods, is_dtensor
from dcp_engine.state.adapters.wrapper import is_wrapper, open_wrapper
from dcp_engine.state.flatten import Path, flatten, get_at, set_leaf
from dcp_engine.state.values import EntryKind, ObjectValue, TensorValue, Value

__all__ = [
    "FLATTEN_MAPPING",
    "ItemState",
    "flatten_sharded_tensors",
    "flatten_state_dict",
    "has_leaf",
    "local_read_items",
    "local_write_items",
    "materialize_meta_tensors",
    "materialized",
    "open_wrappers",
    "put_leaf",
]

FLATTEN_MAPPING = dict[str, Path]
"""Fully qualified name to path in the state dict."""


class ItemState:
    """Descriptions of the values of a state dict, kept while the values stay the same objects.
    Callable from several threads: describing a value twice gives the same."""

    def __init__(self, *, flatten_sharded_tensors: bool, for_load: bool) -> None:
        self._flatten = flatten_sharded_tensors
        self._for_load = for_load
        self._known: dict[str, tuple[Any, list[Value]]] = {}

    def describe(self, fqn: str, value: Any) -> list[Value]:
        """The boxes and memory, or the object, that ``value`` is."""
        known = self._known.get(fqn)
        if known is None or known[0] is not value:
            described = describe(
                fqn,
                value,
                kind=EntryKind.REPLICATED,
                # A planner is not told its group. Alone, only what lies here is described, and
                # what others lack shows when all ranks' plans are validated.
                group=GroupRanks(),
                flatten_sharded_tensors=self._flatten,
                for_load=self._for_load,
            )
            known = self._known[fqn] = (value, described)
        return known[1]

    def find(self, state_dict: Mapping[str, Any], index: MetadataIndex) -> Any:
        """The memory of the box that ``index`` names, or the object.

        Raises ``UsageError`` if there is no such thing in ``state_dict``.
        """
        for value in self._named(state_dict, index.fqn):
            if isinstance(value, ObjectValue):
                return value.value
            if index.offset is None and len(value.tensors) == 1:
                return value.tensors[0]
            for box, tensor in zip(value.boxes, value.tensors, strict=True):
                if index.offset is not None and box.offsets == tuple(index.offset):
                    return tensor
            if 0 in value.shape:
                return torch.empty(value.shape, dtype=value.dtype, device="cpu")
        raise UsageError(
            f"there is no value at offset {None if index.offset is None else list(index.offset)} "
            "in this rank's state dict",
            tensor=index.fqn,
        )

    def _named(self, state_dict: Mapping[str, Any], fqn: str) -> list[Value]:
        if fqn in state_dict:
            return [v for v in self.describe(fqn, state_dict[fqn]) if v.fqn == fqn]
        # A value that describes itself may have chosen other names than its key.
        return [
            value
            for key, holder in state_dict.items()
            if has_checkpoint_methods(holder)
            for value in self.describe(key, holder)
            if value.fqn == fqn
        ]


def flatten_state_dict(
    state_dict: Mapping[str, Any], *, nested: bool = True
) -> tuple[dict[str, Any], FLATTEN_MAPPING]:
    """Values by fully qualified name, and each name's path.

    Raises ``UnsupportedStateError`` for keys that cannot be joined, and for ``PerRank``: items
    have no place for one value per rank.
    """
    flat = flatten(state_dict, flatten_state_dict=nested)
    for leaf in flat.leaves:
        if leaf.per_rank:
            raise UnsupportedStateError(
                "PerRank values cannot be saved or loaded through a planner, writer or reader "
                "that is not the engine's own",
                tensor=leaf.fqn,
                hint="save them in a checkpoint of their own, or under one key per rank",
            )
    return {leaf.fqn: leaf.value for leaf in flat.leaves}, dict(flat.mappings)


def flatten_sharded_tensors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``state_dict``. ``ShardedTensor`` of ``ShardedTensor`` is taken apart where its
    boxes are listed, so nothing has to be rewritten; planners written for torch's DCP call this."""
    return dict(state_dict)


def open_wrappers(flat: Mapping[str, Any], mappings: MutableMapping[str, Path]) -> dict[str, Any]:
    """Replace wrapper subclasses by their inner values (``<fqn>.<attribute>``) and a description
    (``<fqn>.__tensor_flatten__``); ``mappings`` gets the new names."""
    result: dict[str, Any] = {}
    waiting = list(flat.items())[::-1]
    while waiting:
        fqn, value = waiting.pop()
        plain = is_dtensor(value) or has_checkpoint_methods(value)
        if not isinstance(value, torch.Tensor) or plain or not is_wrapper(value):
            if fqn in result:
                raise UnsupportedStateError(
                    "a part of a tensor subclass and another value have one name",
                    kind="duplicate_key",
                    tensor=fqn,
                )
            result[fqn] = value
            continue
        wrapper = open_wrapper(value)
        parts = {FLATTEN_KEY: wrapper.description, **wrapper.inner}
        if fqn in mappings:
            path = mappings.pop(fqn)
            mappings.update({f"{fqn}.{name}": (*path, name) for name in parts})
        waiting.extend((f"{fqn}.{name}", part) for name, part in list(parts.items())[::-1])
    return result


def local_write_items(lookup: ItemState, state_dict: Mapping[str, Any]) -> list[WriteItem]:
    """What this rank offers."""
    return [
        item
        for fqn, value in state_dict.items()
        for described in lookup.describe(fqn, value)
        for item in value_items(described)
    ]


def local_read_items(
    lookup: ItemState,
    state_dict: Mapping[str, Any],
    metadata: Metadata,
    *,
    strict: bool,
    same_dtype: bool,
) -> list[ReadItem]:
    """What this rank wants. Raises ``StateMismatchError`` where ``metadata`` does not have it."""
    items: list[ReadItem] = []
    for fqn, value in state_dict.items():
        for described in lookup.describe(fqn, value):
            stored = metadata.state_dict_metadata.get(described.fqn)
            if stored is None:
                if strict:
                    raise missing_key(described, metadata.state_dict_metadata)
                continue
            # By attribute: the metadata may be of torch's classes.
            is_tensor = hasattr(stored, "chunks")
            if is_tensor != isinstance(described, TensorValue):
                raise StateMismatchError(
                    f"the checkpoint holds {'a tensor' if is_tensor else 'an object'} under this "
                    f"key, the destination is {'an object' if is_tensor else 'a tensor'}",
                    kind="type_mismatch",
                    tensor=described.fqn,
                )
            if not isinstance(described, TensorValue):
                items.append(bytes_read_item(described.fqn))
                continue
            found = read_items(described, stored)
            dtype = stored.properties.dtype  # type: ignore[union-attr]
            if same_dtype and dtype != described.dtype:
                raise StateMismatchError(
                    f"the destination is {described.dtype}, the checkpoint {dtype}",
                    kind="dtype_mismatch",
                    tensor=described.fqn,
                    hint="load into a tensor of the stored dtype and cast it afterwards",
                )
            items.extend(found)
    return items


def materialize_meta_tensors(state_dict: MutableMapping[str, Any]) -> None:
    """Give meta tensors memory, in place: as torch's load planner does."""
    for leaf in flatten(state_dict).leaves:
        value = leaf.value
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            put_leaf(state_dict, leaf.path, materialized(value))


def materialized(value: Any) -> torch.Tensor:
    """A tensor of the same kind as the meta tensor ``value``, with memory of any content."""
    if not is_dtensor(value):
        device = torch.get_default_device()
        return torch.empty_like(value, device="cpu" if device.type == "meta" else device)
    local = torch.empty_like(value.to_local(), device=value.device_mesh.device_type)
    made: torch.Tensor = type(value).from_local(
        local,
        device_mesh=value.device_mesh,
        placements=value.placements,
        shape=value.size(),
        stride=value.stride(),
    )
    return made


def put_leaf(state_dict: MutableMapping[str, Any], path: Path, value: Any) -> None:
    """Replace the value at ``path``; mappings that are missing on the way are made."""
    set_leaf(state_dict, path, value, create={})


def has_leaf(state_dict: Mapping[str, Any], path: Path, value: Any) -> bool:
    """Whether ``value`` itself lies at ``path``."""
    try:
        return get_at(state_dict, path) is value
    except UsageError:
        return False
