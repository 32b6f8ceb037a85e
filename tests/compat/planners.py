"""Planners written for torch's DCP, with their imports changed: those in the docstrings of its
``planner`` module, and some that people write."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from dcp_engine.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _flatten_sharded_tensors,
    flatten_state_dict,
)
from dcp_engine.metadata import (
    STATE_DICT_TYPE,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_engine.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)


class RenameSavePlanner(DefaultSavePlanner):
    def set_up_planner(  # type: ignore[override]
        self,
        state_dict: STATE_DICT_TYPE,
        storage_meta: StorageMeta | None,
        is_coordinator: bool,
    ) -> None:
        # prefix all keys with `foo_``
        super().set_up_planner(
            {"foo_" + k: v for k, v in state_dict.items()}, storage_meta, is_coordinator
        )


class FP16Planner(DefaultSavePlanner):
    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        for p in plan.items:
            if p.tensor_data is not None:
                p.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        item: Any = super().resolve_data(write_item)
        return item if write_item.type == WriteItemType.BYTE_IO else item.to(torch.float16)


class DDPLoadBalancingPlanner(DefaultSavePlanner):
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        iters: list[Iterator[WriteItem]] = [iter(all_plans[0].items)] * len(all_plans)
        items_per_rank = [
            [item for item in items if item is not None]
            for items in zip(*zip_longest(*iters), strict=True)
        ]
        all_plans = [
            replace(plan, items=items)
            for plan, items in zip(all_plans, items_per_rank, strict=True)
        ]
        return super().create_global_plan(all_plans)


class SaveExtraDataPlanner(DefaultSavePlanner):
    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return replace(plan, planner_data="per-rank-data")

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        global_plan, metadata = super().create_global_plan(all_plans)
        merged_data = [p.planner_data for p in global_plan]
        metadata = replace(metadata, planner_data=merged_data)
        return global_plan, metadata


class ExtraDataLoadPlanner(DefaultLoadPlanner):
    """Looks at what ``SaveExtraDataPlanner`` left."""

    seen: Any = None

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.seen = metadata.planner_data if metadata is not None else None


class RenameLoadPlanner(DefaultLoadPlanner):
    def set_up_planner(  # type: ignore[override]
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata,
        is_coordinator: bool,
    ) -> None:
        self.original_state_dict = state_dict
        state_dict = {"foo_" + k: v for k, v in state_dict.items()}

        if self.flatten_sharded_tensors:
            state_dict = _flatten_sharded_tensors(state_dict)

        if self.flatten_state_dict:
            state_dict, self.mappings = flatten_state_dict(state_dict)

        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # Remove the "foo_" prefix
        self.original_state_dict[read_item.dest_index.fqn[4:]] = torch.load(
            value, weights_only=False
        )


class MetaModelMaterialize(DefaultLoadPlanner):
    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(read_item)
        return torch.empty_like(tensor, device="cpu")

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.state_dict[read_item.dest_index.fqn] = tensor


class EverythingLoadPlanner(DefaultLoadPlanner):
    """Loads whatever the checkpoint holds into an empty state dict."""

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None
        for fqn, stored in metadata.state_dict_metadata.items():
            value: Any = None
            if isinstance(stored, TensorStorageMetadata):
                value = torch.empty(stored.size, dtype=stored.properties.dtype)
            state_dict[fqn] = value
        super().set_up_planner(state_dict, metadata, is_coordinator)


class LookupSavePlanner(DefaultSavePlanner):
    """Overrides the two hooks: scales tensors, stores objects in a form of its own."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = super().lookup_object(index)
        return value * 2 if isinstance(value, torch.Tensor) else value

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(repr(object).encode())
        return object + 1


class LookupLoadPlanner(DefaultLoadPlanner):
    """Undoes ``LookupSavePlanner``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        text = value.read().decode()
        self.original_state_dict[read_item.dest_index.fqn] = ("decoded", text)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        tensor.sub_(1).div_(2)


class CastingLoadPlanner(DefaultLoadPlanner):
    """Reads into memory of the stored dtype and casts into the destination."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata[read_item.storage_index.fqn]
        assert isinstance(stored, TensorStorageMetadata)
        return torch.empty(read_item.lengths, dtype=stored.properties.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor)


class OwnSavePlanner(SavePlanner):
    """Derived from the interface: rank 0 writes plain tensors (by halves) and objects."""

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, value in self.state_dict.items() if self.is_coordinator else ():
            if not isinstance(value, torch.Tensor):
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
                continue
            middle = value.shape[0] // 2
            for begin, end in ((0, middle), (middle, value.shape[0])):
                offsets = torch.Size([begin, *[0] * (value.ndim - 1)])
                chunk = ChunkStorageMetadata(offsets, value[begin:end].shape)
                data = TensorWriteData(chunk, TensorProperties(value.dtype), value.shape)
                items.append(
                    WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)
                )
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        entries: dict[str, Any] = {}
        for item in (item for plan in all_plans for item in plan.items):
            if (data := item.tensor_data) is None:
                entries[item.index.fqn] = BytesStorageMetadata()
                continue
            empty = TensorStorageMetadata(data.properties, data.size, [])
            entries.setdefault(item.index.fqn, empty).chunks.append(data.chunk)
        return all_plans, Metadata(entries)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        value = self.state_dict[write_item.index.fqn]
        if write_item.tensor_data is None:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            return buffer
        chunk = write_item.tensor_data.chunk
        part: torch.Tensor = value[chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]]
        return part


class OwnLoadPlanner(LoadPlanner):
    """Derived from the interface, as torch's lets one: without what it does not need."""

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict
        self.md = metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, stored in self.md.state_dict_metadata.items():
            if name not in self.state_dict:
                continue
            index, nothing = MetadataIndex(name), torch.Size((0,))
            if isinstance(stored, BytesStorageMetadata):
                kind = LoadItemType.BYTE_IO
                items.append(ReadItem(kind, index, nothing, index, nothing, nothing))
                continue
            for chunk in stored.chunks:
                items.append(
                    ReadItem(
                        LoadItemType.TENSOR,
                        index,
                        chunk.offsets,
                        MetadataIndex(name, chunk.offsets),
                        torch.Size([0] * len(chunk.sizes)),
                        chunk.sizes,
                    )
                )
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=False)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor: torch.Tensor = self.state_dict[read_item.dest_index.fqn]
        for dim, (begin, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(dim, begin, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass
