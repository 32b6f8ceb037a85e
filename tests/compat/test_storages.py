"""Writers and readers written for torch's DCP through ``save`` and ``load``, on one rank."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.futures import Future

import dcp_engine as dcp
from tests.compat import planners, storages


class Counter:
    """A Stateful value."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.history = torch.full((2,), float(count))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def state(filled: bool) -> dict[str, Any]:
    return {
        "w": torch.arange(12.0).reshape(4, 3) if filled else torch.zeros(4, 3),
        "list": [{"x": torch.ones(2) * filled}, (torch.arange(3) * filled, "s" if filled else "")],
        "n": 5 if filled else 0,
        "none": None if filled else 0,
        "counter": Counter(7 if filled else 0),
    }


def check(found: dict[str, Any]) -> None:
    wanted = state(True)
    assert torch.equal(found["w"], wanted["w"])
    assert torch.equal(found["list"][0]["x"], torch.ones(2))
    assert torch.equal(found["list"][1][0], torch.arange(3))
    assert found["list"][1][1] == "s"
    assert isinstance(found["list"][1], tuple)
    assert (found["n"], found["none"]) == (5, None)
    assert found["counter"].count == 7
    assert torch.equal(found["counter"].history, torch.full((2,), 7.0))


def test_a_dictionary(tmp_path: Path) -> None:
    """On one rank nothing is pickled: plans and results carry functions here."""
    checkpoints: dict[str, Any] = {}
    writer = storages.DictWriter(checkpoints)
    metadata = dcp.save(state(True), checkpoint_id="first", storage_writer=writer, no_dist=True)
    assert writer.calls == [
        "reset",
        "set_up True",
        "prepare_local_plan",
        "prepare_global_plan",
        "write_data",
        "finish",
    ]
    assert list(checkpoints) == ["first"]
    assert metadata.storage_data == {"count": len(checkpoints["first"][1])}
    target = state(False)
    before = target["w"]
    reader = storages.DictReader(checkpoints)
    dcp.load(target, checkpoint_id="first", storage_reader=reader, no_dist=True)
    check(target)
    assert target["w"] is before


def test_files_and_metadata_as_real_classes(tmp_path: Path) -> None:
    writer = storages.FileWriter(tmp_path)
    metadata = dcp.save(state(True), storage_writer=writer, no_dist=True)
    assert (writer.rank, writer.use_collectives) == (0, True)
    assert metadata.storage_meta is not None
    assert metadata.storage_meta.save_id == "the-save"
    assert type(metadata.state_dict_metadata) is dict
    target = state(False)
    dcp.load(target, storage_reader=storages.FileReader(tmp_path), no_dist=True)
    check(target)


@pytest.mark.parametrize("custom", [True, False])
def test_custom_planner_and_custom_storage(tmp_path: Path, custom: bool) -> None:
    dcp.save(
        {"w": torch.ones(4)},
        storage_writer=storages.FileWriter(tmp_path),
        planner=planners.RenameSavePlanner(),
        no_dist=True,
    )
    target = {"w": torch.zeros(4)}
    dcp.load(
        target,
        storage_reader=storages.FileReader(tmp_path),
        planner=planners.RenameLoadPlanner(),
        no_dist=True,
    )
    assert torch.equal(target["w"], torch.ones(4))


def test_a_writer_that_loses_an_item_does_not_commit(tmp_path: Path) -> None:
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(state(True), storage_writer=storages.LosingWriter(tmp_path), no_dist=True)
    assert caught.value.kind == "results_mismatch"
    assert not (tmp_path / ".metadata").exists()


def test_a_future_that_fails(tmp_path: Path) -> None:
    class Failing(storages.FileWriter):
        aborted = False

        def write_data(self, plan: Any, planner: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(OSError("the medium is gone"))
            return future

        def abort(self) -> None:
            self.aborted = True

    writer = Failing(tmp_path)
    with pytest.raises(dcp.CheckpointException, match="the medium is gone"):
        dcp.save(state(True), storage_writer=writer, no_dist=True)
    assert writer.aborted


def save(writer: Any, **options: Any) -> dcp.Metadata:
    return dcp.save(state(True), storage_writer=writer, no_dist=True, **options)


@pytest.mark.parametrize("custom", [True, False])
def test_our_writer_with_methods_overridden(tmp_path: Path, custom: bool) -> None:
    """Extra files and user metadata arrive although its ``set_up`` takes no keywords."""
    (tmp_path / "file.bin").write_bytes(b"from a file")
    writer = storages.TidyWriter(tmp_path / "c")
    planner = planners.DDPLoadBalancingPlanner() if custom else None
    metadata = save(
        writer,
        planner=planner,
        extra_files={"a.json": "{}", "b": b"\x00", "c/d": tmp_path / "file.bin"},
        user_metadata={"run": 7},
    )
    assert writer.log == ["set_up True", "prepare_local_plan", "finish 1"]
    assert "w" in metadata.state_dict_metadata
    assert dcp.read_extra(tmp_path / "c", "a.json") == b"{}"
    assert dcp.read_extra(tmp_path / "c", "c/d") == b"from a file"
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["user_metadata"] == {"run": 7}
    target = state(False)
    dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    check(target)


def test_our_writer_and_reader_inside_others(tmp_path: Path) -> None:
    writer = storages.WrappingWriter(dcp.FileSystemWriter(tmp_path))
    save(writer)
    for reader in (
        dcp.FileSystemReader(tmp_path),
        storages.WrappingReader(dcp.FileSystemReader(tmp_path)),
    ):
        target = state(False)
        dcp.load(target, storage_reader=reader, no_dist=True)
        check(target)
    keywords = ({"extra_files": {"a": "b"}}, {"user_metadata": {"a": 1}}, {"keep_replaced": True})
    for keyword in keywords:
        with pytest.raises(dcp.UsageError, match=next(iter(keyword))):
            save(writer, **keyword)


def test_our_writer_inside_another_aborts_what_it_began(tmp_path: Path) -> None:
    class Failing(storages.WrappingWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            raise dcp.StorageError("no")

    with pytest.raises(dcp.CheckpointException):
        save(Failing(dcp.FileSystemWriter(tmp_path / "c")))
    assert list((tmp_path / "c").iterdir()) == []


def test_per_rank_values_are_not_lost_through_a_wrapped_reader(tmp_path: Path) -> None:
    dcp.save({"r": dcp.PerRank(3)}, checkpoint_id=tmp_path, no_dist=True)
    reader = storages.WrappingReader(dcp.FileSystemReader(tmp_path))
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({"r": None}, storage_reader=reader, no_dist=True)
    assert caught.value.kind == "world_size_mismatch"
    assert caught.value.tensor == "r"


@pytest.mark.parametrize("what", ["writer", "reader"])
def test_torchs_own_classes_are_refused_by_name(tmp_path: Path, what: str) -> None:
    theirs: Any = importlib.import_module("torch.distributed.checkpoint")
    with pytest.raises(dcp.UsageError, match="not a dcp_engine"):
        if what == "writer":
            save(theirs.FileSystemWriter(tmp_path))
        else:
            dcp.load({}, storage_reader=theirs.FileSystemReader(tmp_path), no_dist=True)


def test_a_reader_of_torchs_metadata(tmp_path: Path) -> None:
    """A reader may hand out metadata in torch's own classes."""
    theirs: Any = importlib.import_module("torch.distributed.checkpoint.metadata")

    class Reader(storages.DictReader):
        def read_metadata(self) -> Any:  # type: ignore[override]
            return theirs.Metadata(
                state_dict_metadata={
                    "w": theirs.TensorStorageMetadata(
                        theirs.TensorProperties(dtype=torch.float32),
                        torch.Size([4]),
                        [theirs.ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))],
                    ),
                    "o": theirs.BytesStorageMetadata(),
                }
            )

        def set_up_storage_reader(self, metadata: Any, is_coordinator: bool) -> None:  # type: ignore[override]
            buffer = io.BytesIO()
            torch.save({"a": 1}, buffer)
            self.stored = {
                dcp.MetadataIndex("w", [0]): torch.arange(4.0),
                dcp.MetadataIndex("o"): buffer.getvalue(),
            }

    target: dict[str, Any] = {"w": torch.zeros(4), "o": None}
    dcp.load(target, storage_reader=Reader({}), no_dist=True)
    assert torch.equal(target["w"], torch.arange(4.0))
    assert target["o"] == {"a": 1}
