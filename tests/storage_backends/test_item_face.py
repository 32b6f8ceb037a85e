"""DCP's life cycle against the writer and reader alone: no engine, planners made by hand."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_engine.errors import (
    DamagedCheckpointError,
    InvalidPlanError,
    StateMismatchError,
    StorageError,
    UsageError,
)
from dcp_engine.format.names import new_save_id
from dcp_engine.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_engine.native_storage import SaveTicket
from dcp_engine.plan import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from dcp_engine.planner import LoadPlanner, SavePlanner
from dcp_engine.planning.item_bytes import item_bytes, read_item_bytes
from dcp_engine.storage import ByteStore, WriteResult
from storage_backends import rank_save
from storage_backends.filesystem import FileSystemReader, FileSystemWriter
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.faulty import Fault, FaultyByteStore, TornWrite
from tests.storage_backends.hand_plans import IDENTITY, load_whole, save, whole

Value = torch.Tensor | tuple[tuple[int, ...], tuple[int, ...], torch.Tensor] | Any


class HandSavePlanner(SavePlanner):
    """Whole tensors, shards as (global shape, offsets, tensor), and objects."""

    def __init__(self, state: dict[str, Value]) -> None:
        self.state = state
        self.resolved: list[str] = []

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self.state = state_dict

    def _box(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...], torch.Tensor] | None:
        value = self.state[name]
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), (0,) * value.ndim, value
        return value if isinstance(value, tuple) else None

    def create_local_plan(self) -> SavePlan:
        items = []
        for name in self.state:
            box = self._box(name)
            if box is None:
                data = BytesIOWriteData(nbytes=0)
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, data))
                continue
            size, offsets, tensor = box
            items.append(
                WriteItem(
                    MetadataIndex(name, offsets),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        ChunkStorageMetadata(torch.Size(offsets), tensor.shape),
                        TensorProperties.create_from_tensor(tensor),
                        torch.Size(size),
                    ),
                )
            )
        return SavePlan(items, planner_data={name: (name,) for name in self.state})

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        entries: dict[str, Any] = {}
        paths: dict[str, tuple[str, ...]] = {}
        for plan in all_plans:
            paths.update(plan.planner_data)
            for item in plan.items:
                data = item.tensor_data
                if data is None:
                    entries[item.index.fqn] = BytesStorageMetadata()
                    continue
                empty = TensorStorageMetadata(data.properties, data.size, [])
                entries.setdefault(item.index.fqn, empty).chunks.append(data.chunk)
        return all_plans, Metadata(entries, planner_data=paths)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        self.resolved.append(name)
        box = self._box(name)
        if box is not None:
            return box[2]
        return item_bytes(self.state[name], fqn=name)


class HandLoadPlanner(LoadPlanner):
    """Reads all of what ``state`` (boxes as above) names."""

    def __init__(self, state: dict[str, Value]) -> None:
        self.state = state
        self.committed: list[str] = []
        self.metadata = Metadata({})

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.metadata = metadata if metadata is not None else self.metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, value in self.state.items():
            index = MetadataIndex(name)
            nothing = torch.Size()
            if not isinstance(value, torch.Tensor):
                items.append(
                    ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
                )
                continue
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks:
                items.append(
                    ReadItem(
                        LoadItemType.TENSOR,
                        index,
                        chunk.offsets,
                        MetadataIndex(name, chunk.offsets),
                        torch.Size([0] * len(chunk.offsets)),
                        chunk.sizes,
                    )
                )
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.state[name] = read_item_bytes(value, fqn=name)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self.state[read_item.dest_index.fqn]
        for d, (begin, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(d, begin, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.committed.append(read_item.dest_index.fqn)


def save_items(
    writers: list[ShardedWriter], states: list[dict[str, Value]], **options: Any
) -> list[HandSavePlanner]:
    """DCP's order of calls on as many ranks; what travels is pickled, as between processes."""
    planners = [HandSavePlanner(state) for state in states]
    for rank, (writer, planner) in enumerate(zip(writers, planners, strict=True)):
        writer.reset()
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True, **options)
        planner.set_up_planner(states[rank], writer.storage_meta(), rank == 0)
    local = [
        writer.prepare_local_plan(planner.create_local_plan())
        for writer, planner in zip(writers, planners, strict=True)
    ]
    plans, metadata = planners[0].create_global_plan(local)
    plans = pickle.loads(pickle.dumps(writers[0].prepare_global_plan(plans)))
    results: list[list[WriteResult]] = []
    for rank, writer in enumerate(writers):
        plan = planners[rank].finish_plan(plans[rank])
        results.append(pickle.loads(pickle.dumps(writer.write_data(plan, planners[rank]).wait())))
    writers[0].finish(metadata, results)
    return planners


def load_items(reader: FileSystemReader, state: dict[str, Value]) -> HandLoadPlanner:
    planner = HandLoadPlanner(state)
    reader.reset()
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()
    reader.close_checkpoint()
    return planner


def test_round_trip(tmp_path: Path) -> None:
    state = {
        "w": torch.randn(30, 40),
        "t": torch.randn(5, 6).t(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(9).half(),
        "note": {"lr": 0.5},
        "blob": b"b" * 9000,
    }
    (planner,) = save_items([FileSystemWriter(tmp_path)], [state])
    assert sorted(planner.resolved) == sorted(set(state) - {"empty"})
    into: dict[str, Value] = {
        name: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None
        for name, v in state.items()
    }
    load_planner = load_items(FileSystemReader(tmp_path), into)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(into[name], value)
        else:
            assert into[name] == value
    assert sorted(load_planner.committed) == ["half", "scalar", "t", "w"]


def test_both_faces_read_the_same_checkpoint(tmp_path: Path) -> None:
    state = {"w": torch.randn(30, 40), "v": torch.randn(3).double()}
    save_items([FileSystemWriter(tmp_path)], [state])
    found = load_whole(FileSystemReader(tmp_path), state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_shards_of_several_ranks(tmp_path: Path) -> None:
    full = torch.randn(10, 8)
    states: list[dict[str, Value]] = [
        {"w": ((10, 8), (0, 0), full[:4].clone()), "r": torch.ones(2)},
        {"w": ((10, 8), (4, 0), full[4:].clone()), "o": "mine"},
        {},
    ]
    save_items([FileSystemWriter(tmp_path) for _ in states], states)
    into: dict[str, Value] = {"w": torch.zeros(10, 8), "r": torch.zeros(2), "o": None}
    load_items(FileSystemReader(tmp_path), into)
    assert torch.equal(into["w"], full)
    assert torch.equal(into["r"], torch.ones(2))
    assert into["o"] == "mine"
    metadata = FileSystemReader(tmp_path).read_metadata()
    assert dict(metadata.planner_data) == {"w": ("w",), "r": ("r",), "o": ("o",)}


@pytest.mark.parametrize("how", ["by_worker", "beside_training", None])
def test_all_ranks_give_way_to_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str | None
) -> None:
    """How a rank saves is announced to its own writer; the plan comes from the coordinator."""
    seen: list[tuple[str, bool | None, int]] = []
    write = rank_save.write_file

    def look(store: ByteStore, name: str, *args: Any) -> Any:
        options = args[2]
        seen.append((name.rpartition("/")[2], options.bypass_cache, options.threads))
        return write(store, name, *args)

    monkeypatch.setattr(rank_save, "write_file", look)
    ticket = SaveTicket(
        save_id=new_save_id(), rank=0, world_size=2, coordinator_rank=0, identity=IDENTITY
    )
    if how is not None:
        ticket = replace(ticket, **{how: True})
    states: list[dict[str, Value]] = [{"a": torch.ones(3)}, {"b": torch.ones(3)}]
    save_items([FileSystemWriter(tmp_path, thread_count=3) for _ in states], states, ticket=ticket)
    threads = 1 if how == "beside_training" else 3
    assert sorted(seen) == [
        ("rank00000-00.safetensors", how is not None, threads),
        ("rank00001-00.safetensors", how is not None, threads),
    ]


def test_overwrite_and_storage_meta(tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path)
    save_items([writer], [{"w": torch.ones(3)}])
    save_items([writer], [{"w": torch.full((3,), 2.0)}])
    into = {"w": torch.zeros(3)}
    load_items(FileSystemReader(tmp_path), into)
    assert into["w"].tolist() == [2.0, 2.0, 2.0]
    assert len(os.listdir(tmp_path)) == 2
    meta = writer.storage_meta()
    assert meta is not None
    assert meta.checkpoint_id == str(tmp_path)
    with pytest.raises(UsageError):
        save_items([FileSystemWriter(tmp_path, overwrite=False)], [{"w": torch.ones(3)}])


def test_planner_that_changes_data_without_saying_so(tmp_path: Path) -> None:
    class Casting(HandSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            found = super().resolve_data(write_item)
            return found.half() if isinstance(found, torch.Tensor) else found

    writer = FileSystemWriter(tmp_path)
    planner = Casting({"w": torch.ones(3)})
    writer.reset()
    writer.set_up_storage_writer(True)
    plans, _ = planner.create_global_plan([planner.create_local_plan()])
    (plan,) = writer.prepare_global_plan(plans)
    with pytest.raises(InvalidPlanError) as caught:
        writer.write_data(plan, planner)
    assert (caught.value.kind, caught.value.tensor) == ("results_mismatch", "w")
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_failed_write_is_aborted_everywhere(tmp_path: Path) -> None:
    save_items([FileSystemWriter(tmp_path)], [{"w": torch.ones(3)}])
    before = sorted(os.listdir(tmp_path))
    fault = Fault(
        operation="write", name="*.safetensors", action=TornWrite(9, StorageError("torn")), nth=2
    )
    store = FaultyByteStore(FileSystemStore(tmp_path), [fault])
    writers: list[ShardedWriter] = [
        FileSystemWriter(tmp_path),
        ShardedWriter(lambda _: store, tmp_path),
    ]
    with pytest.raises(StorageError) as caught:
        save_items(writers, [{"a": torch.ones(2)}, {"b": torch.ones(2)}])
    assert caught.value.rank == 1
    for writer in writers:
        writer.abort()
    assert sorted(os.listdir(tmp_path)) == before


def finish_with(
    tmp_path: Path, change: Any, states: list[dict[str, Value]] | None = None
) -> pytest.ExceptionInfo[InvalidPlanError]:
    states = states or [{"w": torch.ones(3), "o": 5}]
    writer = FileSystemWriter(tmp_path)
    planner = HandSavePlanner(states[0])
    writer.reset()
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    (plan,) = writer.prepare_global_plan(plans)
    results = writer.write_data(plan, planner).wait()
    with pytest.raises(InvalidPlanError) as caught:
        writer.finish(metadata, change(results))
    assert caught.value.kind == "results_mismatch"
    assert not (tmp_path / "manifest.json").exists()
    writer.abort()
    return caught


def test_lost_and_foreign_results_stop_the_commit(tmp_path: Path) -> None:
    lost_tensor = finish_with(tmp_path, lambda results: [results[1:]])
    assert lost_tensor.value.tensor == "w"
    lost_object = finish_with(tmp_path, lambda results: [results[:1]])
    assert lost_object.value.tensor == "o"
    finish_with(tmp_path, lambda results: [[]])
    finish_with(tmp_path, lambda results: [[*results, results[0]]])
    foreign = replace(
        WriteResult(MetadataIndex("x"), 0, None), index=MetadataIndex("x", (0,)), storage_data=1
    )
    finish_with(tmp_path, lambda results: [[foreign, *results]])


def test_plan_without_ticket(tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path)
    planner = HandSavePlanner({"w": torch.ones(3)})
    writer.reset()
    writer.set_up_storage_writer(True)
    with pytest.raises(UsageError, match="storage_data"):
        writer.write_data(planner.create_local_plan(), planner)


def test_load_of_what_is_not_there(tmp_path: Path) -> None:
    save_items([FileSystemWriter(tmp_path)], [{"w": torch.ones(3)}])
    reader = FileSystemReader(tmp_path)
    with pytest.raises(UsageError):
        reader.read_data(LoadPlan([]), HandLoadPlanner({}))
    reader.read_metadata()
    item = HandLoadPlanner({"o": None}).create_local_plan()
    with pytest.raises(StateMismatchError) as caught:
        reader.read_data(item, HandLoadPlanner({"o": None}))
    assert (caught.value.kind, caught.value.tensor) == ("missing_key", "o")
    index = MetadataIndex("w", (1,))
    read = ReadItem(
        LoadItemType.TENSOR, index, torch.Size([0]), index, torch.Size([0]), torch.Size([2])
    )
    with pytest.raises(InvalidPlanError):
        reader.read_data(LoadPlan([read]), HandLoadPlanner({"w": torch.zeros(2)}))
    read = replace(read, storage_index=MetadataIndex("w"), storage_offsets=torch.Size([2]))
    with pytest.raises(InvalidPlanError):
        reader.read_data(LoadPlan([read]), HandLoadPlanner({"w": torch.zeros(2)}))
    read = replace(read, storage_offsets=torch.Size([0]))
    with pytest.raises(StateMismatchError):
        reader.read_data(LoadPlan([read]), HandLoadPlanner({"w": torch.zeros(2).half()}))
    reader.close_checkpoint()


def test_damage_is_named(tmp_path: Path) -> None:
    save_items([FileSystemWriter(tmp_path)], [{"w": torch.ones(3)}])
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError) as caught:
        load_items(FileSystemReader(tmp_path), {"w": torch.zeros(3)})
    assert caught.value.tensor == "w"


def test_without_collectives(tmp_path: Path) -> None:
    full = torch.randn(6, 2)
    save_id = new_save_id()
    with pytest.raises(UsageError, match="share"):
        FileSystemWriter(tmp_path).set_up_storage_writer(True, rank=0, use_collectives=False)
    for rank in (1, 0):
        writer = FileSystemWriter(tmp_path)
        state: dict[str, Value] = {
            "w": ((6, 2), (3 * rank, 0), full[3 * rank : 3 * rank + 3].clone())
        }
        planner = HandSavePlanner(state)
        writer.reset()
        writer.set_up_storage_writer(
            True,
            ticket=SaveTicket(
                save_id=save_id,
                rank=rank,
                world_size=2,
                coordinator_rank=0,
                identity=IDENTITY,
                use_collectives=False,
            ),
        )
        plans, metadata = planner.create_global_plan([planner.create_local_plan()])
        (plan,) = writer.prepare_global_plan(plans)
        writer.finish(metadata, [writer.write_data(plan, planner).wait()])
    into = {"w": torch.zeros(6, 2)}
    load_items(FileSystemReader(tmp_path), into)
    assert torch.equal(into["w"], full)


def test_validate_checkpoint_id(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for cls in (FileSystemWriter, FileSystemReader):
        assert cls.validate_checkpoint_id(tmp_path / "new" / "er")
        assert cls.validate_checkpoint_id(f"file://{tmp_path}/x")
        assert not cls.validate_checkpoint_id(tmp_path / "file" / "x")
        assert not cls.validate_checkpoint_id("s3://bucket/x")


def test_data_of_another_planner_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(HandSavePlanner):
        own: Any = None

        def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
            plans, metadata = super().create_global_plan(all_plans)
            return plans, replace(metadata, planner_data=self.own)

    for own, expected in (
        ({"version": 3, "order": [1, 2]}, {"version": 3, "order": [1, 2]}),
        (None, {}),
        (HandSavePlanner, {}),
    ):
        planner = Own({"w": torch.ones(3)})
        planner.own = own
        writer = FileSystemWriter(tmp_path)
        writer.reset()
        writer.set_up_storage_writer(True)
        plans, metadata = planner.create_global_plan([planner.create_local_plan()])
        (plan,) = writer.prepare_global_plan(plans)
        writer.finish(metadata, [writer.write_data(plan, planner).wait()])
        reader = FileSystemReader(tmp_path)
        assert reader.read_metadata().planner_data == expected
        reader.close_checkpoint()
    assert "planner_data" in caplog.text


def test_objects_of_the_column_face_come_as_torch_load_reads_them(tmp_path: Path) -> None:
    values = {"lr": 0.5, "big": {"k": list(range(3000))}}
    save([FileSystemWriter(tmp_path)], whole({"w": torch.ones(2)}, **values), "a" * 32)

    class AsTorch(HandLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            self.state[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    reader = FileSystemReader(tmp_path)
    reader.read_metadata()
    planner = AsTorch(dict.fromkeys(values))
    reader.read_data(planner.create_local_plan(), planner).wait()
    assert planner.state == values
    reader.close_checkpoint()
