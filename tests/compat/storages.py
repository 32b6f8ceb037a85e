"""Storage layers written for torch's DCP, with their imports changed."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.futures import Future

from dcp_engine import FileSystemReader, FileSystemWriter
from dcp_engine.metadata import Metadata, StorageMeta
from dcp_engine.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from dcp_engine.storage import StorageReader, StorageWriter, WriteResult

CheckpointId = str | os.PathLike[str]


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _content(data: torch.Tensor | io.BytesIO) -> Any:
    if isinstance(data, io.BytesIO):
        return data.getvalue()
    return data.detach().cpu().clone()


def _give(plan: LoadPlan, planner: LoadPlanner, stored: Mapping[Any, Any]) -> None:
    for item in plan.items:
        content = stored[item.storage_index]
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(content))
            continue
        for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            content = content.narrow(dim, begin, length)
        target = planner.resolve_tensor(item).detach()
        assert target.size() == content.size()
        target.copy_(content)
        planner.commit_tensor(item, target)


class DictWriter(StorageWriter):
    """Keeps a checkpoint in a dictionary; what it hands round cannot be pickled."""

    def __init__(self, checkpoints: dict[str, Any]) -> None:
        self.checkpoints = checkpoints
        self.calls: list[str] = []
        self.id = "default"

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self.calls.append("reset")
        self.id = str(checkpoint_id) if checkpoint_id is not None else self.id

    def set_up_storage_writer(self, is_coordinator: bool) -> None:  # type: ignore[override]
        self.calls.append(f"set_up {is_coordinator}")
        self.stored: dict[Any, Any] = {}

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.calls.append("prepare_local_plan")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.calls.append("prepare_global_plan")
        return [SavePlan(plan.items, lambda: self.stored, plan.planner_data) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.calls.append("write_data")
        stored = plan.storage_data()
        results = []
        for item in plan.items:
            stored[item.index] = _content(planner.resolve_data(item))
            results.append(WriteResult(item.index, 0, lambda: None))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.calls.append("finish")
        metadata.storage_data = {"count": len(results[0])}
        self.checkpoints[self.id] = (metadata, self.stored)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return True


class DictReader(StorageReader):
    def __init__(self, checkpoints: dict[str, Any]) -> None:
        self.checkpoints = checkpoints
        self.id = "default"

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self.id = str(checkpoint_id) if checkpoint_id is not None else self.id

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        metadata: Metadata = self.checkpoints[self.id][0]
        return metadata

    def set_up_storage_reader(  # type: ignore[override]
        self, metadata: Metadata, is_coordinator: bool
    ) -> None:
        self.stored = self.checkpoints[self.id][1]

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return LoadPlan(plan.items, lambda: self.stored, plan.planner_data)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        _give(plan, planner, plan.storage_data())
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return True


class FileWriter(StorageWriter):
    """One ``torch.save`` file a rank, and a pickle of the metadata by the coordinator."""

    metadata_name = ".metadata"

    def __init__(self, path: CheckpointId) -> None:
        self.path = Path(path)

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.is_coordinator = is_coordinator
        self.rank = kwargs["rank"]
        self.use_collectives = kwargs["use_collectives"]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.path.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            SavePlan(plan.items, f"part{number}.pt", plan.planner_data)
            for number, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        stored = {item.index: _content(planner.resolve_data(item)) for item in plan.items}
        torch.save(stored, self.path / plan.storage_data)
        return _done([WriteResult(index, 1, plan.storage_data) for index in stored])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert type(metadata) is Metadata
        metadata.storage_data = {r.index: r.storage_data for part in results for r in part}
        with open(self.path / self.metadata_name, "wb") as file:
            pickle.dump(metadata, file)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.path, save_id="the-save")


class FileReader(StorageReader):
    def __init__(self, path: CheckpointId) -> None:
        self.path = Path(path)

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        with open(self.path / ".metadata", "rb") as file:
            metadata: Metadata = pickle.load(file)
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.where = metadata.storage_data
        self.rank = kwargs["rank"]

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        stored: dict[Any, Any] = {}
        for name in {self.where[item.storage_index] for item in plan.items}:
            stored.update(torch.load(self.path / name, weights_only=False))
        _give(plan, planner, stored)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return True


class RankLocalWriter(FileWriter):
    """Without collectives every rank keeps metadata of its own, as torch's own writer does."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.metadata_name = ".metadata" if self.use_collectives else f".metadata{self.rank}"
        super().finish(metadata, results)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if self.use_collectives:
            return super().prepare_global_plan(plans)
        return [SavePlan(plans[0].items, f"rank{self.rank}.pt", plans[0].planner_data)]


class RankLocalReader(FileReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        name = f".metadata{kwargs['rank']}" if "rank" in kwargs else ".metadata"
        with open(self.path / name, "rb") as file:
            metadata: Metadata = pickle.load(file)
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self.use_collectives = kwargs["use_collectives"]


class LosingWriter(FileWriter):
    """Says that it wrote less than it was told to."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        return _done(results[1:] if self.rank == 1 or self.is_coordinator else results)


class TidyWriter(FileSystemWriter):
    """The engine's writer with two methods of the life cycle overridden."""

    log: list[str]

    def set_up_storage_writer(self, is_coordinator: bool) -> None:  # type: ignore[override]
        self.log = [f"set_up {is_coordinator}"]
        super().set_up_storage_writer(is_coordinator)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.log.append("prepare_local_plan")
        plan = super().prepare_local_plan(plan)
        items = [i for i in plan.items if i.type != WriteItemType.BYTE_IO]
        items += [i for i in plan.items if i.type == WriteItemType.BYTE_IO]
        return SavePlan(items, plan.storage_data, plan.planner_data)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.log.append(f"finish {len(results)}")
        super().finish(metadata, results)


class WrappingWriter(StorageWriter):
    """Passes everything on to a writer inside."""

    def __init__(self, inner: StorageWriter) -> None:
        self.inner = inner

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self.inner.reset(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.inner.set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return self.inner.prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return self.inner.prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        return self.inner.write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.inner.finish(metadata, results)

    def abort(self) -> None:
        self.inner.abort()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return FileSystemWriter.validate_checkpoint_id(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        return self.inner.storage_meta()


class WrappingReader(StorageReader):
    """Passes everything on to a reader inside, as one did before ``**kwargs`` came."""

    def __init__(self, inner: StorageReader) -> None:
        self.inner = inner

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self.inner.reset(checkpoint_id)

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        return self.inner.read_metadata()

    def set_up_storage_reader(  # type: ignore[override]
        self, metadata: Metadata, is_coordinator: bool
    ) -> None:
        self.inner.set_up_storage_reader(metadata, is_coordinator)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return self.inner.prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return self.inner.prepare_global_plan(plans)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return self.inner.read_data(plan, planner)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return FileSystemReader.validate_checkpoint_id(checkpoint_id)
