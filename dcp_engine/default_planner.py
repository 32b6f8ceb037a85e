"""The planners used unless the caller brings one, and the ones to derive from.

Used as they are, they only carry options: the engine plans in columns and never calls their
methods. Derived from, with a method overridden, they plan in items, in the order of calls that
``planner`` describes, and every method does what torch's planner of this name does.

Belongs here: the two classes, DCP's functions of this module, and the test whether a planner
overrides anything. Does not belong here: how items are made and merged (``planning``).
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dcp_engine.errors import InvalidPlanError, StateMismatchError, UsageError
from dcp_engine.metadata import STATE_DICT_TYPE, Metadata, MetadataIndex, StorageMeta
from dcp_engine.plan import LoadPlan, ReadItem, SavePlan, WriteItem, WriteItemType
from dcp_engine.planner import LoadPlanner, SavePlanner
from dcp_engine.planning.item_bytes import item_bytes, read_item_bytes
from dcp_engine.planning.item_plans import dedup_items, merge_items, validate_items
from dcp_engine.planning.item_state import (
    FLATTEN_MAPPING,
    ItemState,
    flatten_sharded_tensors,
    flatten_state_dict,
    has_leaf,
    local_read_items,
    local_write_items,
    materialize_meta_tensors,
    open_wrappers,
    put_leaf,
)
from dcp_engine.state.adapters import FLATTEN_KEY
from dcp_engine.state.values import Value

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "adopt_replaced_tensors",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
    "described_values",
    "flatten_state_dict",
    "is_default_load_planner",
    "is_default_save_planner",
    "stores_objects_itself",
]

logger = logging.getLogger(__name__)

# Planners written for torch's DCP import this name from torch's module of the same name.
_flatten_sharded_tensors = flatten_sharded_tensors


class DefaultSavePlanner(SavePlanner):
    """Saves everything once, replicated values shared out over the ranks by bytes.

    Args:
        flatten_state_dict: store nested values under their joined keys. False stores each
            top-level value whole; containers become objects.
        flatten_sharded_tensors: take a ``ShardedTensor`` inside a ``ShardedTensor`` apart.
        dedup_replicated_tensors: has no effect, as in torch's DCP.
        dedup_save_to_lowest_rank: the lowest rank that holds a value writes it whole.
        enable_plan_caching: has no effect; the engine caches the plans of this planner anyway,
            and a planner that overrides a method is asked every time.
        strict_replicas: refuse to save values that differ between ranks under one replicated key,
            instead of warning, and compare large tensors too.
    """

    mappings: FLATTEN_MAPPING

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
        strict_replicas: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.dedup_save_to_lowest_rank = dedup_save_to_lowest_rank
        self.enable_plan_caching = enable_plan_caching
        self.strict_replicas = strict_replicas
        self.mappings = {}
        self._lookup = ItemState(flatten_sharded_tensors=flatten_sharded_tensors, for_load=False)
        if dedup_replicated_tensors is not None:
            logger.warning("DefaultSavePlanner(dedup_replicated_tensors=...) has no effect")

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Flatten ``state_dict``; sets ``state_dict``, ``mappings`` and ``is_coordinator``."""
        flat, mappings = flatten_state_dict(state_dict, nested=self.flatten_state_dict)
        self.mappings = mappings if self.flatten_state_dict else {}
        self.state_dict = open_wrappers(flat, self.mappings)
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """An item per box and per object of ``self.state_dict``; ``self.plan`` too. With
        ``flatten_state_dict``, ``planner_data`` is ``self.mappings``."""
        plan = SavePlan(local_write_items(self._lookup, self.state_dict))
        if self.flatten_state_dict:
            plan = replace(plan, planner_data=self.mappings)
        self.plan = plan
        return plan

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        return dedup_items(all_plans, to_lowest_rank=self.dedup_save_to_lowest_rank)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Leave each item on one rank, check that tensors are whole; ``self.global_plan`` and
        ``self.metadata`` too.

        Raises ``InvalidPlanError`` (``plan_divergence``, ``plan_gap``, ``plan_overlap``).
        """
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        if self.flatten_state_dict:
            mappings: dict[str, Any] = {}
            for plan in reversed(plans):
                # A planner derived from this one may have put something else there.
                if isinstance(plan.planner_data, Mapping):
                    mappings.update(plan.planner_data)
            metadata = replace(metadata, planner_data=mappings)
        validate_items(metadata)
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Keep ``new_plan`` as ``self.plan``."""
        self.plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """``transform_object`` of ``lookup_object``."""
        data: torch.Tensor | io.BytesIO = self.transform_object(
            write_item, self.lookup_object(write_item.index)
        )
        return data

    def lookup_object(self, index: MetadataIndex) -> Any:
        """To be overridden: the shard or value that ``index`` names."""
        return self._lookup.find(self.state_dict, index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """To be overridden: what is stored for ``object``. Values that are not tensors become
        bytes that ``torch.load`` or ``DefaultLoadPlanner.load_bytes`` reads."""
        if write_item.type is WriteItemType.BYTE_IO:
            return item_bytes(object, fqn=write_item.index.fqn)
        return object


class DefaultLoadPlanner(LoadPlanner):
    """Fills the tensors of a state dict in place and replaces its other values.

    Args:
        flatten_state_dict, flatten_sharded_tensors: as they were at save.
        allow_partial_load: keys that are not stored keep their values, instead of an error.
        allow_pickle: execute pickles where an object needs it.
    """

    mappings: FLATTEN_MAPPING
    original_state_dict: STATE_DICT_TYPE

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        allow_pickle: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.allow_partial_load = allow_partial_load
        self.allow_pickle = allow_pickle
        self.original_state_dict = {}
        self.mappings = {}
        self.metadata: Metadata | None = None
        self._lookup = ItemState(flatten_sharded_tensors=flatten_sharded_tensors, for_load=True)

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Flatten ``state_dict``; meta tensors in it get memory. Sets ``original_state_dict``,
        ``state_dict``, ``mappings``, ``metadata`` and ``is_coordinator``."""
        materialize_meta_tensors(state_dict)
        self.original_state_dict = state_dict
        flat, mappings = flatten_state_dict(state_dict, nested=self.flatten_state_dict)
        self.mappings = mappings if self.flatten_state_dict else {}
        self.state_dict = open_wrappers(flat, self.mappings)
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """An item for every stored chunk that meets a box of ``self.state_dict``, and for every
        object.

        Raises ``StateMismatchError`` (``missing_key``, ``shape_mismatch``, ``type_mismatch``,
        and ``dtype_mismatch`` unless a method that hands out tensors is overridden).
        """
        if self.metadata is None:
            raise UsageError("create_local_plan needs the metadata that set_up_planner was given")
        converts = any(
            _overrides(self, DefaultLoadPlanner, name)
            for name in ("resolve_tensor", "commit_tensor", "lookup_tensor", "transform_tensor")
        )
        return LoadPlan(
            local_read_items(
                self._lookup,
                self.state_dict,
                self.metadata,
                strict=not self.allow_partial_load,
                same_dtype=not converts,
            )
        )

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads what it asked for."""
        return create_default_global_load_plan(global_plan)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Accept ``central_plan``."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Decode ``value`` and put it where it belongs in ``original_state_dict``.

        Raises ``UnsafeContentError(kind="pickle_refused")`` for a pickle that would run code,
        unless ``allow_pickle``.
        """
        fqn = read_item.dest_index.fqn
        loaded = read_item_bytes(value, fqn=fqn, allow_pickle=self.allow_pickle)
        if fqn.endswith("." + FLATTEN_KEY):
            if loaded != self.state_dict.get(fqn):
                raise StateMismatchError(
                    "the destination is another tensor subclass, or one with another context, "
                    "than what was saved",
                    kind="type_mismatch",
                    tensor=fqn.rpartition(".")[0],
                )
            return
        self.state_dict[fqn] = loaded
        path = self.mappings.get(fqn, (fqn,))
        put_leaf(self.original_state_dict, path, loaded)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """``transform_tensor`` of ``lookup_tensor``."""
        return self.transform_tensor(read_item, self.lookup_tensor(read_item.dest_index))

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: ``resolve_tensor`` gave the destination's own memory."""
        return None

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """To be overridden: the memory of the destination's box that ``index`` names."""
        tensor: torch.Tensor = self._lookup.find(self.state_dict, index)
        return tensor

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        """To be overridden: the part of ``tensor`` that ``read_item`` fills.

        Raises ``InvalidPlanError(kind="plan_overlap")`` for a box that leaves ``tensor``.
        """
        offsets, lengths, shape = read_item.dest_offsets, read_item.lengths, tuple(tensor.shape)
        if len(lengths) > len(shape) or any(
            begin < 0 or length < 0 or begin + length > size
            for begin, length, size in zip(offsets, lengths, shape, strict=False)
        ):
            raise InvalidPlanError(
                f"the box at {tuple(offsets)} of {tuple(lengths)} leaves a destination of {shape}",
                kind="plan_overlap",
                tensor=read_item.dest_index.fqn,
            )
        for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
            if length != shape[dim]:
                tensor = tensor.narrow(dim, offset, length)
        return tensor


def create_default_local_save_plan(state_dict: dict[str, Any], is_coordinator: bool) -> SavePlan:
    """One rank's items for a flat ``state_dict``: an item per box and per object. Every rank
    offers what it holds; the global plan decides who writes it."""
    lookup = ItemState(flatten_sharded_tensors=True, for_load=False)
    return SavePlan(local_write_items(lookup, state_dict))


def create_default_global_save_plan(
    all_plans: list[SavePlan], rewrite_index_hints: bool = True
) -> tuple[list[SavePlan], Metadata]:
    """The plans (deduplicated already) with index hints, and the metadata of all their items.

    Raises ``InvalidPlanError`` if ranks disagree about a name or write a value twice.
    """
    return merge_items(all_plans, rewrite_index_hints=rewrite_index_hints)


def create_default_local_load_plan(
    state_dict: dict[str, Any], metadata: Metadata, strict: bool = True
) -> LoadPlan:
    """One rank's items to fill a flat ``state_dict`` from what ``metadata`` describes, resharding
    where needed.

    Raises ``StateMismatchError`` (``missing_key`` if ``strict``, ``shape_mismatch``,
    ``type_mismatch``).
    """
    lookup = ItemState(flatten_sharded_tensors=True, for_load=True)
    return LoadPlan(local_read_items(lookup, state_dict, metadata, strict=strict, same_dtype=False))


def create_default_global_load_plan(all_plans: list[LoadPlan]) -> list[LoadPlan]:
    """The plans as they are: ranks read what they asked for."""
    return all_plans


def described_values(planner: DefaultSavePlanner | DefaultLoadPlanner) -> list[Value]:
    """What ``planner`` holds on this rank, after ``set_up_planner``."""
    state_dict = getattr(planner, "state_dict", {})
    return [v for fqn, value in state_dict.items() for v in planner._lookup.describe(fqn, value)]


def stores_objects_itself(planner: DefaultSavePlanner) -> bool:
    """Whether ``planner`` overrides how values that are not tensors become bytes."""
    return any(
        _overrides(planner, DefaultSavePlanner, name)
        for name in ("resolve_data", "lookup_object", "transform_object")
    )


def adopt_replaced_tensors(planner: DefaultLoadPlanner, before: Mapping[str, Any]) -> None:
    """Put tensors that a method of ``planner`` (``commit_tensor``, as torch's documentation shows
    it) put into its flat ``state_dict`` where they belong in ``original_state_dict``.

    Args:
        before: ``planner.state_dict`` as it was when the load was planned.
    """
    for fqn, value in planner.state_dict.items():
        old = before.get(fqn)
        if value is old or not isinstance(value, torch.Tensor) or old is None:
            continue
        path = planner.mappings.get(fqn, (fqn,))
        # A planner that renames keys has no place for them there, or the place of another value.
        if has_leaf(planner.original_state_dict, path, old):
            put_leaf(planner.original_state_dict, path, value)


def is_default_save_planner(planner: SavePlanner) -> bool:
    """Whether ``planner`` decides as ``DefaultSavePlanner`` does: no method is overridden, in its
    class or on itself. Options may differ."""
    return _is_default(planner, DefaultSavePlanner)


def is_default_load_planner(planner: LoadPlanner) -> bool:
    """Whether ``planner`` decides as ``DefaultLoadPlanner`` does; see
    ``is_default_save_planner``."""
    return _is_default(planner, DefaultLoadPlanner)


def _is_default(planner: object, default: type) -> bool:
    names = {
        name
        for cls in default.__mro__[:-1]
        for name, value in vars(cls).items()
        if callable(value) and not (name.startswith("__") and name.endswith("__"))
    }
    return isinstance(planner, default) and not any(
        _overrides(planner, default, name) for name in names
    )


def _overrides(planner: object, default: type, name: str) -> bool:
    own = getattr(type(planner), name) is not getattr(default, name)
    return own or name in getattr(planner, "__dict__", {})
