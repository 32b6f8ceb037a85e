"""A storage layer as somebody would write it for torch's DCP: checkpoints in a dictionary.

For one process; what it keeps cannot be sent to another one.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field

import torch
from torch.futures import Future

from dcp_engine.metadata import Metadata, MetadataIndex
from dcp_engine.plan import LoadItemType, LoadPlan, SavePlan
from dcp_engine.planner import LoadPlanner, SavePlanner
from dcp_engine.storage import StorageReader, StorageWriter, WriteResult
from storage_backends.testing.contracts.medium import Medium

CheckpointId = str | os.PathLike[str]
Contents = dict[MetadataIndex, bytes]


@dataclass
class DictionaryStorage:
    """What is stored, by checkpoint id. Writers and readers of one storage share it."""

    checkpoints: dict[str, tuple[Metadata, Contents]] = field(default_factory=dict)
    pending: dict[str, Contents] = field(default_factory=dict)


class DictionaryWriter(StorageWriter):
    def __init__(self, storage: DictionaryStorage, checkpoint_id: CheckpointId = "default") -> None:
        self.storage = storage
        self.id = str(checkpoint_id)
        self.written: list[MetadataIndex] = []

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self.abort()
        self.id = str(checkpoint_id) if checkpoint_id is not None else self.id

    def set_up_storage_writer(  # type: ignore[override]  # as it was before **kwargs came
        self, is_coordinator: bool
    ) -> None:
        self.is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        pending = self.storage.pending.setdefault(self.id, {})
        results = []
        for item in plan.items:
            data = planner.resolve_data(item)
            content = data.getvalue() if isinstance(data, io.BytesIO) else _packed(data)
            pending[item.index] = content
            self.written.append(item.index)
            results.append(WriteResult(item.index, len(content), None))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.storage.checkpoints[self.id] = (metadata, self.storage.pending.pop(self.id, {}))
        self.written = []

    def abort(self) -> None:
        pending = self.storage.pending.get(self.id, {})
        for index in self.written:
            pending.pop(index, None)
        self.written = []

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return isinstance(checkpoint_id, str)


class DictionaryReader(StorageReader):
    def __init__(self, storage: DictionaryStorage, checkpoint_id: CheckpointId = "default") -> None:
        self.storage = storage
        self.id = str(checkpoint_id)

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self.id = str(checkpoint_id) if checkpoint_id is not None else self.id

    def read_metadata(self) -> Metadata:  # type: ignore[override]  # as above
        return self.storage.checkpoints[self.id][0]

    def set_up_storage_reader(  # type: ignore[override]  # as above
        self, metadata: Metadata, is_coordinator: bool
    ) -> None:
        self.contents = self.storage.checkpoints[self.id][1]

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            content = self.contents[item.storage_index]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(content))
                continue
            source = torch.load(io.BytesIO(content), weights_only=True)
            for dim, at in enumerate(item.storage_offsets):
                source = source.narrow(dim, at, item.lengths[dim])
            target = planner.resolve_tensor(item).detach()
            target.copy_(source)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return isinstance(checkpoint_id, str)


class DictionaryMedium(Medium):
    """The storage of one checkpoint id, looked at without writer and reader."""

    def __init__(self, storage: DictionaryStorage, checkpoint_id: str) -> None:
        self._storage = storage
        self._id = checkpoint_id

    def snapshot(self) -> dict[str, bytes]:
        stored = self._storage.checkpoints.get(self._id)
        found = {} if stored is None else {f"stored {i}": data for i, data in stored[1].items()}
        if stored is not None:
            found["metadata"] = repr(sorted(stored[0].state_dict_metadata)).encode()
        pending = self._storage.pending.get(self._id, {})
        return {**found, **{f"pending {i}": data for i, data in pending.items()}}

    def read(self, name: str) -> bytes:
        return self.snapshot()[name]

    def write(self, name: str, data: bytes) -> None:
        raise NotImplementedError("its content cannot be replaced from outside")

    def names(self) -> set[str]:
        return set(self.snapshot())


def _packed(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor.detach().cpu().clone(), file)
    return file.getvalue()
