"""A storage layer as somebody would write it for torch's DCP: files in a directory.

A ``torch.save`` file for each rank's tensors and bytes, and a pickle of the metadata, which takes
its name last. Writers and readers can be sent to another process.
"""

from __future__ import annotations

import io
import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import torch
from torch.futures import Future

from dcp_engine.metadata import Metadata
from dcp_engine.plan import LoadItemType, LoadPlan, SavePlan
from dcp_engine.planner import LoadPlanner, SavePlanner
from dcp_engine.registry import scheme_of
from dcp_engine.storage import StorageReader, StorageWriter, WriteResult

CheckpointId = str | os.PathLike[str]

_METADATA = ".metadata"


class FileWriter(StorageWriter):
    def __init__(self, path: CheckpointId) -> None:
        self.path = Path(path)
        self.part: Path | None = None
        self.is_coordinator = False

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self.part = None
        self.path = Path(checkpoint_id) if checkpoint_id is not None else self.path

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        save = uuid.uuid4().hex
        return [
            SavePlan(plan.items, f"{save}-{rank}.pt", plan.planner_data)
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        contents = [_tensor(planner.resolve_data(item)) for item in plan.items]
        self.path.mkdir(parents=True, exist_ok=True)
        self.part = self.path / plan.storage_data
        with self.part.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [
                WriteResult(item.index, content.nbytes, (plan.storage_data, at))
                for at, (item, content) in enumerate(zip(plan.items, contents, strict=True))
            ]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {r.index: r.storage_data for part in results for r in part}
        with (self.path / f"{_METADATA}.tmp").open("wb") as file:
            pickle.dump(metadata, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.path / f"{_METADATA}.tmp", self.path / _METADATA)
        if self.part is not None:
            save = self.part.name.partition("-")[0]
            for part in self.path.glob("*.pt"):
                if part.name.partition("-")[0] != save:
                    part.unlink()

    def abort(self) -> None:
        if self.part is not None:
            self.part.unlink(missing_ok=True)
            if self.is_coordinator:
                (self.path / f"{_METADATA}.tmp").unlink(missing_ok=True)
        self.part = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return scheme_of(checkpoint_id) == "file"


class FileReader(StorageReader):
    def __init__(self, path: CheckpointId) -> None:
        self.path = Path(path)

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self.path = Path(checkpoint_id) if checkpoint_id is not None else self.path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _stored_metadata(self.path)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.where = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        names = {self.where[item.storage_index][0] for item in plan.items}
        parts = {name: torch.load(self.path / name, weights_only=True) for name in names}
        for item in plan.items:
            name, at = self.where[item.storage_index]
            source = parts[name][at]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(source.numpy().tobytes()))
                continue
            for dim, begin in enumerate(item.storage_offsets):
                source = source.narrow(dim, begin, item.lengths[dim])
            target = planner.resolve_tensor(item).detach()
            target.copy_(source)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return scheme_of(checkpoint_id) == "file"


def _tensor(data: torch.Tensor | io.BytesIO) -> torch.Tensor:
    if isinstance(data, io.BytesIO):
        return torch.tensor(list(data.getvalue()), dtype=torch.uint8)
    return data.detach().cpu().clone()


def _stored_metadata(path: Path) -> Metadata:
    with (path / _METADATA).open("rb") as file:
        metadata: Metadata = pickle.load(file)
    return metadata
