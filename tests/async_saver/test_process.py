"""Asynchronous saves by a worker process, of one rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.async_saver import AsyncSaver, in_process
from dcp_engine.executors.process import WorkerProcess, WorkerSettings, launch
from dcp_engine.staging.copier import Copier
from tests.async_saver.gated import (
    Boom,
    CountingPlanner,
    FailingWriter,
    Gate,
    GatedWriter,
    HeldWriter,
    UnpicklablePlanner,
    wait_until,
)
from tests.async_saver.states import assert_holds, every_kind, overwrite

LIMIT = 60
PROCESS = dcp.AsyncCheckpointerType.PROCESS


@pytest.fixture(scope="module")
def engine() -> Iterator[dcp.Engine]:
    """One worker for most tests: starting one costs seconds."""
    made = dcp.Engine()
    yield made
    made.close()


def save(engine: dcp.Engine, path: Path, value: float, **options: Any) -> dcp.AsyncSaveResponse:
    """Save ``every_kind(value)`` and change it at once."""
    state = every_kind(value)
    if "storage_writer" not in options:
        options.setdefault("checkpoint_id", path)
    response = engine.async_save(state, async_checkpointer_type=PROCESS, **options)
    overwrite(state)
    return response


@pytest.mark.parametrize(("given", "expected"), [(None, 10), (0, 0), (3, 3)])
def test_a_worker_gives_way(
    monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int
) -> None:
    """How it does: ``tests/executors``."""
    started: list[WorkerSettings] = []

    class Worker(WorkerProcess):
        def start(self) -> None:
            started.append(self.settings)

    monkeypatch.setattr(in_process, "WorkerProcess", Worker)
    saver = AsyncSaver(0, nice=given)
    saver._process.start()
    saver.close(0)
    assert [settings.nice for settings in started] == [expected]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def shared_memory_of(*pids: int) -> set[str]:
    """Names in /dev/shm that these processes have or had: torch puts the process id into them, and
    what is mapped shows as long as they live."""
    own = re.compile(rf"(?<!\d)({'|'.join(map(str, pids))})(?!\d)")
    names = {name for name in os.listdir("/dev/shm") if own.search(name)}
    for pid in pids:
        maps = Path(f"/proc/{pid}/maps")
        if maps.exists():
            names |= {line.split()[-1] for line in maps.read_text().splitlines() if "/shm/" in line}
    return names


def test_what_happens_to_the_state_afterwards_does_not_matter(
    engine: dcp.Engine, tmp_path: Path
) -> None:
    pids = set()
    for turn in range(3):
        metadata = save(engine, tmp_path / "c", turn).result(LIMIT)
        assert "plain" in metadata.state_dict_metadata
        assert_holds(tmp_path / "c", turn)
        pids.add(engine.worker_pid)
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_the_second_save_sends_no_structure(engine: dcp.Engine, tmp_path: Path) -> None:
    engine.clear_plan_cache()
    state: dict[str, Any] = {f"layer{i}.weight": torch.full((3, 3), float(i)) for i in range(2000)}
    state |= {f"group{i}": {"lr": i, "betas": (0.9, i)} for i in range(1000)}
    for _ in range(2):
        engine.async_save(
            state, checkpoint_id=tmp_path / "c", async_checkpointer_type=PROCESS
        ).result(LIMIT)
    assert engine._async is not None
    assert engine._async.bytes_sent < 4096


def test_a_failed_save_leaves_the_worker_alive(engine: dcp.Engine, tmp_path: Path) -> None:
    save(engine, tmp_path / "c", 1).result(LIMIT)
    pid = engine.worker_pid
    for unpicklable in (False, True):
        writer = FailingWriter(tmp_path / "c", unpicklable=unpicklable)
        response = save(engine, tmp_path / "c", 2, storage_writer=writer)
        with pytest.raises(dcp.CheckpointException) as caught:
            response.result(LIMIT)
        if unpicklable:
            assert "not to be pickled" in str(caught.value)
        else:
            assert isinstance(caught.value.failures[0][0], Boom)
        assert_holds(tmp_path / "c", 1)
    save(engine, tmp_path / "c", 3).result(LIMIT)
    assert_holds(tmp_path / "c", 3)
    assert engine.worker_pid == pid


@pytest.mark.parametrize("method", ["observe", "write_columns", "commit_columns"])
def test_a_killed_worker_fails_one_save(engine: dcp.Engine, tmp_path: Path, method: str) -> None:
    save(engine, tmp_path / "c", 1).result(LIMIT)
    gate = Gate(tmp_path / "gate")
    writer = GatedWriter(tmp_path / "c", gate, method)
    response = save(engine, tmp_path / "c", 2, storage_writer=writer)
    gate.wait_for_visitor()
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(dcp.CheckpointException) as caught:
        response.result(LIMIT)
    cause = caught.value.failures[0][0]
    assert isinstance(cause, dcp.CoordinationError)
    assert cause.kind == "worker_died"
    assert str(pid) in str(cause)
    assert_holds(tmp_path / "c", 1)
    save(engine, tmp_path / "c", 3).result(LIMIT)
    assert_holds(tmp_path / "c", 3)
    assert engine.worker_pid != pid
    assert len(list((tmp_path / "c").iterdir())) == 2, "the dead save's data is removed"


def test_a_worker_killed_after_the_commit(engine: dcp.Engine, tmp_path: Path) -> None:
    save(engine, tmp_path / "c", 1).result(LIMIT)
    gate = Gate(tmp_path / "gate")
    writer = GatedWriter(tmp_path / "c", gate, "commit_columns", after=True)
    response = save(engine, tmp_path / "c", 2, storage_writer=writer)
    gate.wait_for_visitor()
    assert engine.worker_pid is not None
    os.kill(engine.worker_pid, signal.SIGKILL)
    assert "plain" in response.result(LIMIT).state_dict_metadata, "it is committed, and known to be"
    assert_holds(tmp_path / "c", 2)


def test_a_worker_killed_as_it_tidies_up_does_not_hide_the_failure(
    engine: dcp.Engine, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    writer = FailingWriter(tmp_path / "c", gate=gate)
    response = save(engine, tmp_path / "c", 2, storage_writer=writer)
    gate.wait_for_visitor()
    assert engine.worker_pid is not None
    os.kill(engine.worker_pid, signal.SIGKILL)
    with pytest.raises(dcp.CheckpointException) as caught:
        response.result(LIMIT)
    assert isinstance(caught.value.failures[0][0], Boom)
    assert "then the worker was lost" in "".join(caught.value.__notes__)


def test_a_worker_killed_when_all_is_said(engine: dcp.Engine, tmp_path: Path) -> None:
    """It has left the operation, and has yet to answer."""
    gate = Gate(tmp_path / "gate")
    close = "dcp_engine.coordination.single:SingleOperation.close"
    writer = HeldWriter(tmp_path / "c", gate, close, after=True)
    planner = CountingPlanner()
    response = save(engine, tmp_path / "c", 2, storage_writer=writer, planner=planner)
    gate.wait_for_visitor()
    assert engine.worker_pid is not None
    os.kill(engine.worker_pid, signal.SIGKILL)
    assert "plain" in response.result(LIMIT).state_dict_metadata
    assert_holds(tmp_path / "c", 2)


def test_a_stopped_worker_is_killed(engine: dcp.Engine, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    writer = GatedWriter(tmp_path / "c", gate, "write_columns")
    response = save(engine, tmp_path / "c", 2, storage_writer=writer, stall_timeout=0.5)
    gate.wait_for_visitor()
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(dcp.CheckpointException, match=f"{pid}.* was stopped") as caught:
        response.result(LIMIT)
    assert caught.value.kind == "stalled"
    assert list(caught.value.failures) == [0]
    assert gone(pid)


def test_a_worker_that_was_stopped_before_is_replaced(engine: dcp.Engine, tmp_path: Path) -> None:
    save(engine, tmp_path / "c", 1).result(LIMIT)
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    save(engine, tmp_path / "c", 2, stall_timeout=0.5).result(LIMIT)
    assert_holds(tmp_path / "c", 2)
    assert gone(pid)


def test_a_worker_killed_while_idle_costs_nothing(engine: dcp.Engine, tmp_path: Path) -> None:
    save(engine, tmp_path / "c", 1).result(LIMIT)
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid), "the worker's end")
    save(engine, tmp_path / "c", 2).result(LIMIT)
    assert_holds(tmp_path / "c", 2)


def test_a_worker_killed_while_the_state_is_copied(
    engine: dcp.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has nothing to do with the save yet."""
    save(engine, tmp_path / "c", 1).result(LIMIT)
    copy, go = Copier.copy, threading.Event()

    def late(*args: Any, **kwargs: Any) -> None:
        assert go.wait(LIMIT)
        copy(*args, **kwargs)

    monkeypatch.setattr(Copier, "copy", late)
    state = every_kind(2)
    response = engine.async_save(
        state,
        checkpoint_id=tmp_path / "c",
        async_checkpointer_type=PROCESS,
        background_staging=True,
    )
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid), "the worker's end")
    go.set()
    engine.wait_for_staging(LIMIT)
    overwrite(state)
    response.result(LIMIT)
    assert_holds(tmp_path / "c", 2)


def test_a_custom_planner_lives_in_the_worker(engine: dcp.Engine, tmp_path: Path) -> None:
    planner = CountingPlanner()
    metadata = save(engine, tmp_path / "c", 5, planner=planner).result(LIMIT)
    assert "plain" in metadata.state_dict_metadata
    assert planner.plans == 0
    assert_holds(tmp_path / "c", 5)


def test_what_cannot_be_pickled_is_refused_at_the_call(engine: dcp.Engine, tmp_path: Path) -> None:
    with pytest.raises(dcp.UsageError, match="lock"):
        save(engine, tmp_path / "c", 1, planner=UnpicklablePlanner())
    writer = GatedWriter(tmp_path / "c", Gate(tmp_path / "gate"), "never")
    writer.gate = iter(())  # type: ignore[assignment]
    writer.handler = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(dcp.UsageError, match="handler"):
        save(engine, tmp_path / "c", 1, storage_writer=writer)
    save(engine, tmp_path / "c", 2).result(LIMIT)
    assert_holds(tmp_path / "c", 2)


def test_memory_of_this_process_is_refused(engine: dcp.Engine) -> None:
    with pytest.raises(dcp.CheckpointError, match="one process only"):
        save(engine, Path("-"), 1, checkpoint_id="memory://here").result(LIMIT)


def test_background_staging(engine: dcp.Engine, tmp_path: Path) -> None:
    """The state is changed and freed at once, on the thread that staged it."""
    state = every_kind(9)
    response = engine.async_save(
        state,
        checkpoint_id=tmp_path / "c",
        async_checkpointer_type=PROCESS,
        background_staging=True,
    )
    response.staging_completion.add_done_callback(lambda _: overwrite(state))
    engine.wait_for_staging(LIMIT)
    response.result(LIMIT)
    assert_holds(tmp_path / "c", 9)


class Cloner(dcp.AsyncStager):
    """A stager of another origin."""

    def stage(self, state_dict: dict[str, Any]) -> Any:
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state_dict.items()}


def test_a_custom_stager(engine: dcp.Engine, tmp_path: Path) -> None:
    state = {"w": torch.ones(5), "step": 3}
    response = engine.async_save(
        state,
        checkpoint_id=tmp_path / "c",
        async_checkpointer_type=PROCESS,
        async_stager=Cloner(),
    )
    state["w"].zero_()
    response.result(LIMIT)
    into = {"w": torch.zeros(5), "step": 0}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert into["w"].tolist() == [1] * 5


class Later(dcp.AsyncStager):
    """Its copy comes when the test says so."""

    def __init__(self) -> None:
        self.staged: Future[Any] = Future()

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def stage(self, state_dict: dict[str, Any]) -> Any:
        return self.staged


def test_a_save_behind_a_late_stager(engine: dcp.Engine, tmp_path: Path) -> None:
    """The second save has the engine's one arena before the first one needs memory that the
    worker can map."""
    stager = Later()
    first = engine.async_save(
        {}, checkpoint_id=tmp_path / "a", async_checkpointer_type=PROCESS, async_stager=stager
    )
    second = save(engine, tmp_path / "b", 2)
    stager.staged.set_result(every_kind(1))
    first.result(LIMIT)
    second.result(LIMIT)
    assert_holds(tmp_path / "a", 1)
    assert_holds(tmp_path / "b", 2)


@pytest.mark.parametrize("stager", [None, Cloner()])
def test_too_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stager: dcp.AsyncStager | None
) -> None:
    """This process saves then, if asked to."""

    def none_left(nbytes: int) -> None:
        raise dcp.StagingError("no memory", kind="out_of_memory")

    monkeypatch.setattr("dcp_engine.staging.arena.require_memory", none_left)
    state = {"w": torch.ones(1 << 20)}
    options: dict[str, Any] = {
        "checkpoint_id": tmp_path / "c",
        "async_checkpointer_type": PROCESS,
        "async_stager": stager,
    }
    with dcp.Engine() as engine:
        with pytest.raises(dcp.CheckpointError, match="no memory"):
            engine.async_save(state, **options).result(LIMIT)
        assert not (tmp_path / "c" / "manifest.json").exists()
        engine.async_save(state, **options, on_low_memory="sync").result(LIMIT)
    into = {"w": torch.zeros(1 << 20)}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert torch.equal(into["w"], state["w"])


def test_the_first_call_does_not_wait_for_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes up when it is let; by then the state has long been copied, and changed."""
    gate = Gate(tmp_path / "gate")
    held = f"import os, time\nwhile not os.path.exists({str(gate.directory / 'released')!r}): "
    monkeypatch.setattr(launch, "_BOOTSTRAP", held + "time.sleep(0.01)\n" + launch._BOOTSTRAP)
    with dcp.Engine() as engine:
        response = save(engine, tmp_path / "c", 3)
        assert response.staging_completion.done()
        assert response.progress().phase == "waiting"
        assert engine.worker_pid is not None, "it is on its way"
        gate.open()
        response.result(LIMIT)
    assert_holds(tmp_path / "c", 3)


def test_stagers_that_come_and_go(engine: dcp.Engine, tmp_path: Path) -> None:
    """More arenas than the worker keeps; the first one comes again."""
    first = dcp.DefaultStager()
    for turn in range(10):
        with dcp.DefaultStager() as other:
            stager = first if turn in (0, 9) else other
            save(engine, tmp_path / "c", turn, async_stager=stager).result(LIMIT)
            assert_holds(tmp_path / "c", turn)
    first.close()


def test_without_collectives(engine: dcp.Engine, tmp_path: Path) -> None:
    save(engine, tmp_path / "c", 8, use_collectives=False).result(LIMIT)
    assert_holds(tmp_path / "c", 8)


def test_warmup_starts_the_worker_and_touches_the_memory(tmp_path: Path) -> None:
    state = {"w": torch.ones(4 << 20)}
    with dcp.Engine() as engine:
        engine.warmup(state)
        pid = engine.worker_pid
        assert pid is not None
        assert engine._async is not None
        assert engine._async._stager.arenas.present() >= 16 << 20
        engine.async_save(
            state, checkpoint_id=tmp_path / "c", async_checkpointer_type=PROCESS
        ).result(LIMIT)
        assert engine.worker_pid == pid
        assert not shared_memory_of(os.getpid(), pid)
    assert gone(pid)


SCRIPT = """
import os, sys, torch
import dcp_engine as dcp

class MyPlanner(dcp.DefaultSavePlanner):
    def create_local_plan(self):
        return super().create_local_plan()

engine = dcp.default_engine()
for turn in range(2):
    response = dcp.async_save(
        {"w": torch.full((1000, 1000), float(turn))},
        checkpoint_id=sys.argv[1],
        async_checkpointer_type=dcp.AsyncCheckpointerType.PROCESS,
        planner=MyPlanner(),
    )
print(os.getpid(), engine.worker_pid, flush=True)
if sys.argv[2] == "kill":
    response.result()
    os.kill(os.getpid(), 9)
"""


THREADS = """
import sys, torch
import dcp_engine as dcp

for turn in range(2):
    dcp.async_save(
        {f"w{i}": torch.full((1000, 1000), float(turn)) for i in range(20)},
        storage_writer=dcp.FileSystemWriter(sys.argv[1], thread_count=4),
    )
"""


def test_the_end_of_the_program_waits_for_threads(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", THREADS, str(tmp_path / "c")], check=True, timeout=120)
    into = {f"w{i}": torch.zeros(1000, 1000) for i in range(20)}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert all(w.unique().tolist() == [1] for w in into.values())


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_the_end_of_the_program(tmp_path: Path, ending: str) -> None:
    """Without a main guard: pending saves are drained, the worker ends with its parent, killed or
    not, and its memory with it."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "c"), ending],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == (0 if ending == "exit" else -signal.SIGKILL), ended.stderr
    parent, pid = map(int, ended.stdout.splitlines()[-1].split())
    wait_until(lambda: gone(pid), "the worker's end")
    assert "Error" not in ended.stderr
    into = {"w": torch.zeros(1000, 1000)}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert into["w"].unique().tolist() == [1]
    assert not shared_memory_of(parent, pid)
