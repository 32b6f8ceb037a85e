"""Asynchronous saves by a thread: what the caller gets, and when."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from storage_backends import direct_io, filesystem_file, filesystem_store, vectored_io
from storage_backends.testing.faulty import Hang
from storage_backends.testing.faulty_calls import CallFault, faulty_writer
from tests.async_saver.states import (
    assert_holds,
    bytes_of,
    destination,
    every_kind,
    held_writer,
    overwrite,
)

LIMIT = 60


class Boom(Exception):
    """What an injected fault raises."""


def none_left(nbytes: int) -> None:
    """For ``require_memory``."""
    raise dcp.StagingError("no memory", kind="out_of_memory")


@pytest.fixture
def engine() -> Iterator[dcp.Engine]:
    made = dcp.Engine()
    yield made
    made.close()


def test_a_future_of_metadata(engine: dcp.Engine, tmp_path: Path) -> None:
    response = engine.async_save(every_kind(), checkpoint_id=tmp_path / "c")
    assert isinstance(response, Future)
    assert response.upload_completion is response
    assert not response.cancel()
    metadata = response.result(LIMIT)
    assert response.staging_completion.done()
    assert set(metadata.state_dict_metadata) > {"plain", "step", "options.lr"}
    assert response.progress().phase == "done"
    assert response.exception() is None


def test_the_first_save_looks_for_no_backend(
    engine: dcp.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would wait for the import."""

    def look(**given: Any) -> Any:
        raise Boom

    monkeypatch.setattr(metadata, "entry_points", look)
    engine.async_save({"w": torch.ones(4)}, checkpoint_id=tmp_path / "c").result(LIMIT)
    with pytest.raises(Boom):
        engine.async_save({"w": torch.ones(4)}, checkpoint_id="memory://c")


@pytest.mark.parametrize("background", [False, True])
def test_what_happens_to_the_state_afterwards_does_not_matter(
    engine: dcp.Engine, tmp_path: Path, background: bool
) -> None:
    """At once: on the thread that staged, if that is another one."""
    for turn in range(3):
        state = every_kind(turn)
        response = engine.async_save(
            state, checkpoint_id=tmp_path / "c", background_staging=background
        )
        response.staging_completion.add_done_callback(lambda _, state=state: overwrite(state))
        response.result(LIMIT)
        assert not state, "it was overwritten"
        assert_holds(tmp_path / "c", turn)


def test_the_module_function_is_the_default_engine(tmp_path: Path) -> None:
    response = dcp.async_save(
        every_kind(2),
        storage_writer=dcp.FileSystemWriter(tmp_path / "c"),
        async_checkpointer_type=dcp.AsyncCheckpointerType.THREAD,
        no_dist=True,
    )
    response.result(LIMIT)
    assert_holds(tmp_path / "c", 2)


def test_saves_happen_in_order_and_the_second_waits_for_memory(
    engine: dcp.Engine, tmp_path: Path
) -> None:
    writer, entered, released = held_writer(tmp_path / "c")
    first = engine.async_save(every_kind(1), storage_writer=writer)
    assert entered.wait(LIMIT)
    assert not first.done()
    second: list[dcp.AsyncSaveResponse] = []
    caller = threading.Thread(
        target=lambda: second.append(engine.async_save(every_kind(2), checkpoint_id=tmp_path / "c"))
    )
    caller.start()
    caller.join(0.3)
    assert caller.is_alive(), "there is one arena, and the first save holds it"
    released.set()
    caller.join(LIMIT)
    second[0].result(LIMIT)
    assert first.done()
    assert_holds(tmp_path / "c", 2)


def test_two_pending_saves_with_two_arenas(tmp_path: Path) -> None:
    with dcp.Engine(max_pending=2) as engine:
        writer, entered, released = held_writer(tmp_path / "a")
        first = engine.async_save(every_kind(1), storage_writer=writer)
        assert entered.wait(LIMIT)
        state = every_kind(2)
        second = engine.async_save(state, checkpoint_id=tmp_path / "b")
        overwrite(state)
        assert not first.done()
        assert not second.done()
        assert second.progress().phase == "waiting"
        released.set()
        second.result(LIMIT)
    assert_holds(tmp_path / "a", 1)
    assert_holds(tmp_path / "b", 2)


@pytest.mark.parametrize("limit", [{"timeout": 0.2}, {"phase_timeouts": {"staging": 0.2}}])
def test_waiting_for_memory_has_a_deadline(
    engine: dcp.Engine, tmp_path: Path, limit: dict[str, Any]
) -> None:
    writer, entered, released = held_writer(tmp_path / "a")
    first = engine.async_save(every_kind(1), storage_writer=writer)
    assert entered.wait(LIMIT)
    with pytest.raises(dcp.CoordinationError, match="max_pending") as caught:
        engine.async_save(every_kind(2), checkpoint_id=tmp_path / "b", **limit)
    assert caught.value.kind == "timeout"
    released.set()
    first.result(LIMIT)
    assert not (tmp_path / "b").exists()


def test_progress_names_the_phase(engine: dcp.Engine, tmp_path: Path) -> None:
    writer, entered, released = held_writer(tmp_path / "c", "commit_columns")
    response = engine.async_save(every_kind(), storage_writer=writer)
    assert entered.wait(LIMIT)
    assert response.progress().phase == "commit"
    released.set()
    response.result(LIMIT)
    assert response.progress().phase == "done"


def test_a_failed_save_is_in_its_future_and_the_next_one_works(
    engine: dcp.Engine, tmp_path: Path
) -> None:
    dcp.save(every_kind(1), checkpoint_id=tmp_path / "c", no_dist=True)
    fault = CallFault(method="write_columns", error=Boom("no"))
    writer = faulty_writer(dcp.FileSystemWriter(tmp_path / "c"), [fault], rank=0)
    response = engine.async_save(every_kind(2), storage_writer=writer)
    with pytest.raises(dcp.CheckpointException) as caught:
        response.result(LIMIT)
    assert isinstance(caught.value.failures[0][0], Boom)
    assert response.progress().phase == "failed"
    assert response.staging_completion.exception() is None
    assert_holds(tmp_path / "c", 1)
    engine.async_save(every_kind(3), storage_writer=writer).result(LIMIT)
    assert_holds(tmp_path / "c", 3)


def failing(path: Path) -> dcp.StorageWriter:
    fault = CallFault(method="write_columns", error=Boom("no"))
    return faulty_writer(dcp.FileSystemWriter(path), [fault], rank=0)


def test_a_failure_nobody_looked_at_comes_up_at_the_next_save(
    engine: dcp.Engine, tmp_path: Path
) -> None:
    response = engine.async_save(every_kind(), storage_writer=failing(tmp_path / "c"))
    engine.wait_for_staging(LIMIT)
    concurrent = threading.Event()
    response.add_done_callback(lambda _: concurrent.set())
    assert concurrent.wait(LIMIT)
    with pytest.raises(dcp.CheckpointException, match="no") as caught:
        engine.async_save(every_kind(), checkpoint_id=tmp_path / "d")
    assert any("nobody looked" in note for note in caught.value.__notes__)
    engine.async_save(every_kind(4), checkpoint_id=tmp_path / "d").result(LIMIT)
    assert_holds(tmp_path / "d", 4)


def test_a_failure_nobody_looked_at_comes_up_at_close(tmp_path: Path) -> None:
    engine = dcp.Engine()
    engine.async_save(every_kind(), storage_writer=failing(tmp_path / "c"))
    with pytest.raises(dcp.CheckpointException, match="no"):
        engine.close()
    engine.close()
    with pytest.raises(dcp.UsageError, match="closed"):
        engine.async_save(every_kind(), checkpoint_id=tmp_path / "c")


def test_no_failure_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two saves fail while both are pending: one failure can be raised, the other is logged."""
    engine = dcp.Engine(max_pending=2)
    both_pending = threading.Event()
    for name in ("first", "second"):
        fault = CallFault(method="write_columns", error=Boom(name), hang=Hang(both_pending))
        writer = faulty_writer(dcp.FileSystemWriter(tmp_path / name), [fault], rank=0)
        engine.async_save(every_kind(), storage_writer=writer)
    both_pending.set()
    with pytest.raises(dcp.CheckpointException, match="first"):
        engine.close()
    assert [str(r.exc_info[1]).count("second") > 0 for r in caplog.records if r.exc_info] == [True]


def test_close_waits_for_pending_saves(tmp_path: Path) -> None:
    engine = dcp.Engine(max_pending=3)
    for turn in range(3):
        engine.async_save(every_kind(turn), checkpoint_id=tmp_path / f"{turn}")
    engine.close()
    for turn in range(3):
        assert_holds(tmp_path / f"{turn}", turn)


def test_what_cannot_be_saved_is_refused_at_the_call(engine: dcp.Engine, tmp_path: Path) -> None:
    with pytest.raises(dcp.UnsupportedStateError, match="bad"):
        engine.async_save({"bad": threading.Lock()}, checkpoint_id=tmp_path / "c")
    engine.async_save(every_kind(5), checkpoint_id=tmp_path / "c").result(LIMIT)
    assert_holds(tmp_path / "c", 5)


def test_too_little_memory(
    engine: dcp.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_engine.staging.arena.require_memory", none_left)
    large = {"w": torch.ones(1 << 20)}
    with pytest.raises(dcp.StagingError, match="no memory"):
        engine.async_save(large, checkpoint_id=tmp_path / "c")
    response = engine.async_save(large, checkpoint_id=tmp_path / "c", on_low_memory="sync")
    assert response.done(), "it was saved while the caller waited"
    into = {"w": torch.zeros(1 << 20)}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert torch.equal(into["w"], large["w"])
    with pytest.raises(dcp.UsageError, match="on_low_memory"):
        engine.async_save(large, checkpoint_id=tmp_path / "c", on_low_memory="maybe")  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no nice value here")
def test_only_the_writing_gives_way(
    engine: dcp.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = vectored_io.pwrite_all
    seen: set[tuple[str, int]] = set()

    def look(descriptor: int, *args: Any) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        kind = "data" if name.endswith(".safetensors") else "other"
        seen.add((kind, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        write(descriptor, *args)

    for module in (filesystem_file, filesystem_store, direct_io):
        monkeypatch.setattr(module, "pwrite_all", look)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    lowered = min(own + 5, 19)

    def writers() -> set[tuple[str, int]]:
        found = set(seen)
        seen.clear()
        return found

    for turn in range(2):
        engine.async_save(every_kind(turn), checkpoint_id=tmp_path / "c").result(LIMIT)
        assert writers() == {("data", lowered), ("other", own)}
        engine.save(every_kind(turn), checkpoint_id=tmp_path / "c", no_dist=True)
        assert writers() == {("data", own), ("other", own)}
    for nice in (0, 19):
        with dcp.Engine(nice=nice) as other:
            other.async_save(every_kind(), checkpoint_id=tmp_path / "c").result(LIMIT)
        assert writers() == {("data", min(own + nice, 19)), ("other", own)}
    # Who waits for it wants it soon.
    monkeypatch.setattr("dcp_engine.staging.arena.require_memory", none_left)
    large = {"w": torch.ones(1 << 20)}
    response = engine.async_save(large, checkpoint_id=tmp_path / "c", on_low_memory="sync")
    response.result(LIMIT)
    assert writers() == {("data", own), ("other", own)}
    for nice in (-1, 20):
        with pytest.raises(dcp.UsageError, match="nice"):
            dcp.Engine(nice=nice)


def test_extra_files_are_those_of_the_call(engine: dcp.Engine, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("before")
    told: dict[str, Any] = {"run": [1]}
    response = engine.async_save(
        every_kind(),
        checkpoint_id=tmp_path / "c",
        extra_files={"config.json": config},
        user_metadata=told,
    )
    config.write_text("after")
    told["run"].append(2)
    response.result(LIMIT)
    assert dcp.read_extra(tmp_path / "c", "config.json") == b"before"


class RecordingPlanner(dcp.DefaultSavePlanner):
    """Overrides a method, so that DCP's life cycle runs."""

    plans = 0

    def create_local_plan(self) -> dcp.SavePlan:
        self.plans += 1
        return super().create_local_plan()


def test_a_custom_planner(engine: dcp.Engine, tmp_path: Path) -> None:
    planner = RecordingPlanner()
    for turn in range(2):
        state = every_kind(turn)
        response = engine.async_save(state, checkpoint_id=tmp_path / "c", planner=planner)
        overwrite(state)
        response.result(LIMIT)
        assert planner.plans == turn + 1
        assert_holds(tmp_path / "c", turn)


class Cloner(dcp.AsyncStager):
    """A stager of another origin, with DCP's interface."""

    def __init__(self, *, later: bool = False, fails: bool = False) -> None:
        self.calls: list[str] = []
        self.later = later
        self.fails = fails

    def stage(self, state_dict: dict[str, Any]) -> Any:
        self.calls.append("stage")
        if self.fails and not self.later:
            raise Boom("stage")
        copy = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state_dict.items()}
        if not self.later:
            return copy
        future: Future[Any] = Future()
        if self.fails:
            future.set_exception(Boom("stage"))
        else:
            future.set_result(copy)
        return future

    def synchronize_staging(self) -> None:
        self.calls.append("synchronize")


@pytest.mark.parametrize("later", [False, True])
def test_a_custom_stager(engine: dcp.Engine, tmp_path: Path, later: bool) -> None:
    stager = Cloner(later=later)
    state = {"w": torch.ones(5), "step": 3}
    response = engine.async_save(state, checkpoint_id=tmp_path / "c", async_stager=stager)
    state["w"].zero_()
    response.result(LIMIT)
    assert stager.calls == ["stage", "synchronize"]
    into = {"w": torch.zeros(5), "step": 0}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert into["w"].tolist() == [1] * 5
    assert into["step"] == 3


class Part:
    """A ``Stateful`` that goes on changing."""

    def __init__(self) -> None:
        self.held = torch.ones(3)

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = state_dict["held"]


class DeepCloner(dcp.AsyncStager):
    """Clones tensors in dicts, and knows of nothing else."""

    def stage(self, state_dict: dict[str, Any]) -> Any:
        return {
            name: self.stage(value)
            if isinstance(value, dict)
            else value.clone()
            if isinstance(value, torch.Tensor)
            else value
            for name, value in state_dict.items()
        }


def test_a_custom_stager_gets_the_state_of_what_has_state(
    engine: dcp.Engine, tmp_path: Path
) -> None:
    part = Part()
    state = {"parts": {"one": part}, "two": Part()}
    writer, _, released = held_writer(tmp_path / "c", "observe")
    response = engine.async_save(state, storage_writer=writer, async_stager=DeepCloner())
    part.held.zero_()
    state["two"].held.zero_()
    released.set()
    response.result(LIMIT)
    into = {"parts": {"one": Part()}, "two": Part()}
    for loaded in (into["parts"]["one"], into["two"]):
        loaded.held.fill_(7)
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert into["parts"]["one"].held.tolist() == [1, 1, 1]
    assert into["two"].held.tolist() == [1, 1, 1]


def test_a_custom_stager_that_fails(engine: dcp.Engine, tmp_path: Path) -> None:
    with pytest.raises(Boom):
        engine.async_save(
            {"w": torch.ones(2)}, checkpoint_id=tmp_path / "c", async_stager=Cloner(fails=True)
        )
    response = engine.async_save(
        {"w": torch.ones(2)},
        checkpoint_id=tmp_path / "c",
        async_stager=Cloner(fails=True, later=True),
    )
    with pytest.raises(dcp.CheckpointException, match="stage"):
        response.result(LIMIT)
    assert isinstance(response.staging_completion.exception(), Boom)
    assert not (tmp_path / "c").exists()


def test_a_custom_stager_that_never_ends(engine: dcp.Engine, tmp_path: Path) -> None:
    class Endless(Cloner):
        def stage(self, state_dict: dict[str, Any]) -> Any:
            return Future()

        def synchronize_staging(self) -> None:
            return None

    response = engine.async_save(
        {}, checkpoint_id=tmp_path / "c", async_stager=Endless(), phase_timeouts={"staging": 0.2}
    )
    with pytest.raises(dcp.CheckpointException, match="was not there") as caught:
        response.result(LIMIT)
    assert caught.value.kind == "timeout"
    engine.async_save(every_kind(4), checkpoint_id=tmp_path / "c").result(LIMIT)
    assert_holds(tmp_path / "c", 4)


def test_dcps_stagers(engine: dcp.Engine, tmp_path: Path) -> None:
    with dcp.DefaultStager(dcp.StagingOptions(use_async_staging=True)) as stager:
        state = every_kind(6)
        response = engine.async_save(state, checkpoint_id=tmp_path / "c", async_stager=stager)
        response.staging_completion.result(LIMIT)
        overwrite(state)
        response.result(LIMIT)
    assert_holds(tmp_path / "c", 6)
    state = {"w": torch.ones(3)}
    response = engine.async_save(
        state, checkpoint_id=tmp_path / "d", async_stager=dcp.BlockingAsyncStager()
    )
    state["w"].zero_()
    response.result(LIMIT)
    into = {"w": torch.zeros(3)}
    dcp.load(into, checkpoint_id=tmp_path / "d", no_dist=True)
    assert into["w"].tolist() == [1, 1, 1]


def test_background_staging_and_the_hook(engine: dcp.Engine, tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    handle = engine.install_staging_hook(optimizer)
    for turn in range(5):
        model(torch.ones(2, 300)).sum().backward()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        response = engine.async_save(
            {"model": model.state_dict()},
            checkpoint_id=tmp_path / f"{turn}",
            background_staging=True,
        )
        optimizer.step()
        response.result(LIMIT)
        into = {"model": {k: torch.zeros_like(v) for k, v in before.items()}}
        dcp.load(into, checkpoint_id=tmp_path / f"{turn}", no_dist=True)
        for name, value in before.items():
            assert torch.equal(into["model"][name], value)
    handle.remove()


def test_background_staging_of_state_that_changed_fails_the_save(
    engine: dcp.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcp_engine.staging.copier import Copier

    copy = Copier.copy
    go = threading.Event()

    def late(*args: Any, **kwargs: Any) -> None:
        assert go.wait(LIMIT)
        copy(*args, **kwargs)

    monkeypatch.setattr(Copier, "copy", late)
    state = {"w": torch.ones(100)}
    response = engine.async_save(state, checkpoint_id=tmp_path / "c", background_staging=True)
    state["w"].add_(1)
    go.set()
    with pytest.raises(dcp.CheckpointException, match="changed while"):
        response.result(LIMIT)
    with pytest.raises(dcp.StagingError, match="changed while"):
        response.staging_completion.result(LIMIT)
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_without_collectives(engine: dcp.Engine, tmp_path: Path) -> None:
    state = every_kind(8)
    response = engine.async_save(state, checkpoint_id=tmp_path / "c", use_collectives=False)
    overwrite(state)
    response.result(LIMIT)
    assert_holds(tmp_path / "c", 8)


def test_destination_is_never_what_was_saved() -> None:
    for name, value in destination().items():
        if isinstance(value, torch.Tensor) and value.numel():
            assert not any(bytes_of(value)), name
