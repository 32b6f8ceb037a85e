"""Subclasses of the built-in writer and reader, as they are written for torch's DCP."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.staging.writer_stager import stager_of

STATE = {"w": torch.arange(4.0), "o": {"k": 1}}


class Marking(dcp.FileSystemWriter):
    """Leaves a file beside the checkpoint that it has committed."""

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        (self.path / "DONE").touch()


class Following(dcp.FileSystemWriter):
    """Keeps the attributes itself, as one has to where the base class is another one."""

    def __init__(self, path: Any) -> None:
        self.path = path
        super().__init__(path, thread_count=2)
        self.overwrite = False
        self.thread_count = 1

    def reset(self, checkpoint_id: Any = None) -> None:
        super().reset(checkpoint_id)
        if checkpoint_id:
            self.path = checkpoint_id


def test_attributes_say_where_it_points(tmp_path: Path) -> None:
    writer = Marking(f"file://{tmp_path}/one", thread_count=3, overwrite=False)
    assert (writer.path, writer.thread_count, writer.overwrite) == (tmp_path / "one", 3, False)
    assert writer.checkpoint_id == f"file://{tmp_path}/one"
    dcp.save(STATE, storage_writer=writer)
    dcp.save(STATE, checkpoint_id=tmp_path / "two", storage_writer=writer)
    assert (writer.path, writer.checkpoint_id) == (tmp_path / "two", str(tmp_path / "two"))
    assert (tmp_path / "one" / "DONE").exists()
    assert (tmp_path / "two" / "DONE").exists()
    assert pickle.loads(pickle.dumps(writer)).path == tmp_path / "two"
    reader = dcp.FileSystemReader(tmp_path / "one")
    assert reader.path == reader.checkpoint_id == tmp_path / "one"
    reader.reset(str(tmp_path / "two"))
    assert (reader.path, reader.checkpoint_id) == (tmp_path / "two", str(tmp_path / "two"))
    for nowhere in (dcp.FileSystemWriter(), dcp.FileSystemReader()):
        assert nowhere.checkpoint_id is None
        with pytest.raises(dcp.UsageError, match="neither a path nor a checkpoint_id"):
            _ = nowhere.path


def test_attributes_that_are_assigned_count(tmp_path: Path) -> None:
    writer = Following(tmp_path / "one")
    assert (writer.path, writer.thread_count, writer.overwrite) == (tmp_path / "one", 1, False)
    dcp.save(STATE, checkpoint_id=tmp_path / "two", storage_writer=writer)
    writer.path = tmp_path / "three"
    dcp.save(STATE, storage_writer=writer)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["three", "two"]
    with pytest.raises(dcp.CheckpointException, match="overwrite is False"):
        dcp.save(STATE, storage_writer=writer)
    reader = dcp.FileSystemReader(tmp_path / "one")
    reader.path = tmp_path / "two"
    found: dict[str, Any] = {"w": torch.zeros(4), "o": {"k": 0}}
    dcp.load(found, storage_reader=reader)
    assert found["w"].tolist() == [0, 1, 2, 3]
    reader.read_metadata()
    with pytest.raises(dcp.UsageError, match="under way"):
        reader.path = tmp_path / "three"
    assert reader.path == tmp_path / "two"


class Leaving(dcp.FileSystemWriter):
    """Overrides DCP's hook, nothing else of a stager."""

    def stage(self, state_dict: Any) -> Any:
        return super().stage({k: v for k, v in state_dict.items() if k != "secret"})


class Copying(dcp.AsyncStager):
    """A stager to be mixed in."""

    def stage(self, state_dict: Any) -> Any:
        return {k: v.clone() for k, v in state_dict.items() if k != "secret"}


class Mixed(dcp.FileSystemWriter, Copying):
    """Gets the hook from its second base class."""


@pytest.mark.parametrize("make", [Leaving, Mixed])
def test_a_writer_that_overrides_stage_stages(
    tmp_path: Path, make: type[dcp.FileSystemWriter]
) -> None:
    state = {"w": torch.arange(4.0), "secret": torch.ones(1)}
    with dcp.Engine() as engine:
        saved = engine.async_save(state, storage_writer=make(tmp_path), no_dist=True)
        state["w"].zero_()
        assert list(saved.result(60).state_dict_metadata) == ["w"]
    found = {"w": torch.zeros(4)}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert found["w"].tolist() == [0, 1, 2, 3]


def test_without_memory_nothing_is_saved_that_was_not_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(nbytes: int) -> None:
        raise dcp.StagingError("no memory", kind="out_of_memory")

    monkeypatch.setattr("dcp_engine.staging.arena.require_memory", none_left)
    state = {"w": torch.ones(1 << 20), "secret": torch.ones(1)}
    with dcp.Engine() as engine, pytest.raises(dcp.StagingError, match="no memory"):
        engine.async_save(
            state, storage_writer=Leaving(tmp_path), on_low_memory="sync", no_dist=True
        )
    assert not (tmp_path / "manifest.json").exists()


def test_who_stages(tmp_path: Path) -> None:
    class HandingOn(dcp.FileSystemWriter):
        """Gives what it does not have from another writer."""

        def __init__(self, inner: Any) -> None:
            super().__init__(tmp_path)
            self.stage = inner.stage

    plain, leaving, mixed = dcp.FileSystemWriter(tmp_path), Leaving(tmp_path), Mixed(tmp_path)
    assert stager_of(plain) is None
    assert stager_of(HandingOn(plain)) is None
    assert stager_of(object()) is None
    for writer in (leaving, mixed, HandingOn(leaving), Copying()):
        assert stager_of(writer) is writer
