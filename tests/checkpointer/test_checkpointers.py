"""Sync and async checkpointers, as the builders make them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.checkpointer import (
    AsyncCheckpointer,
    BarrierConfig,
    CheckpointerConfig,
    CheckpointNotFoundError,
    CheckpointReader,
    CheckpointStager,
    CheckpointStagerConfig,
    CheckpointWriterConfig,
    DefaultStager,
    RankInfo,
    SyncCheckpointer,
    WriterHook,
    make_async_checkpointer,
    make_sync_checkpointer,
    wrap_future,
)
from dcp_engine.checkpointer.staging import StagedStateDict
from dcp_engine.errors import CheckpointException, UnsupportedStateError, UsageError
from tests.checkpointer import children
from tests.checkpointer.test_barriers import tcp_args
from tests.checkpointer.test_process import CONFIG
from tests.ports import free_port


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def checkpointer(marks: Path) -> Iterator[AsyncCheckpointer]:
    made = make_async_checkpointer(
        CheckpointerConfig(process_config=CONFIG),
        rank_info=RankInfo(0, 1),
        checkpoint_writer_init_fn=children.hooked_writer,
        checkpoint_writer_init_args={"directory": str(marks)},
    )
    with made:
        yield made


class Hook(WriterHook):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        self.seen.append(kwargs)

    def post_commit(self, path: str, **kwargs: Any) -> None:
        self.seen.append(kwargs)


def test_a_sync_checkpointer_saves_and_loads(tmp_path: Path) -> None:
    hook = Hook()
    state = {"model": {"w": torch.ones(2, 2)}, "step": 7}
    with make_sync_checkpointer(commit_hook=hook) as checkpointer:
        assert isinstance(checkpointer, SyncCheckpointer)
        assert checkpointer.save(str(tmp_path / "c"), state, epoch=1) is None
        assert hook.seen == [{"epoch": 1}] * 2
        into = {"model": {"w": torch.zeros(2, 2)}, "step": 0}
        assert checkpointer.load(str(tmp_path / "c"), into) is into
        assert into["step"] == 7
        assert into["model"]["w"].tolist() == [[1.0, 1.0]] * 2
        assert checkpointer.load(str(tmp_path / "c"))["step"] == 7
        moved = checkpointer.load(str(tmp_path / "c"), default_map_location="cpu")
        assert moved["model"]["w"].device.type == "cpu"
    with pytest.raises(UsageError, match="closed"):
        checkpointer.save(str(tmp_path / "c"), state)


def test_strict_refuses_missing_keys_and_the_rest_does_not(tmp_path: Path) -> None:
    with make_sync_checkpointer() as checkpointer:
        checkpointer.save(str(tmp_path / "c"), {"a": 1})
        assert checkpointer.load(str(tmp_path / "c"), {"a": 0, "b": 2}) == {"a": 1, "b": 2}
        with pytest.raises(RuntimeError, match="lacks 1 keys: b") as caught:
            checkpointer.load(str(tmp_path / "c"), {"a": 0, "b": 2}, strict=True)
        assert isinstance(caught.value, dcp.StateMismatchError)
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.load(str(tmp_path / "nowhere"))


def test_an_async_save_does_not_see_later_changes(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    state = {"w": torch.ones(1000), "list": [1, 2]}
    staged, written = checkpointer.save(str(tmp_path / "c"), state)
    assert staged.result() is None
    state["w"].zero_()
    state["list"].append(3)
    assert written.result() is None
    found = checkpointer.load(str(tmp_path / "c"))
    assert found["w"].tolist() == [1.0] * 1000
    assert found["list"] == [1, 2]


def test_a_save_waits_for_the_one_before_and_raises_what_it_raised(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    path = str(tmp_path / "c")
    _, first = checkpointer.save(path, {"a": 1})
    _, second = checkpointer.save(path, {"a": 2}, fail="second")
    assert first.done()
    with pytest.raises(CheckpointException, match="asked to fail: second"):
        checkpointer.save(path, {"a": 3})
    assert second.done()
    assert checkpointer.load(path) == {"a": 1}
    _, fourth = checkpointer.save(path, {"a": 4})  # once told is enough
    fourth.result()
    assert checkpointer.load(path) == {"a": 4}


def test_a_state_that_cannot_be_staged_is_refused_at_the_call(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        checkpointer.save(str(tmp_path / "c"), {"bad": [torch.ones(1), lambda: 0]})
    assert caught.value.tensor == "bad.1"
    checkpointer.save(str(tmp_path / "c"), {"a": 1})[1].result()


def test_keyword_arguments_of_a_save_reach_the_child(
    checkpointer: AsyncCheckpointer, tmp_path: Path, marks: Path
) -> None:
    checkpointer.save(str(tmp_path / "c"), {"a": 1}, step=12)[1].result()
    assert (marks / "post_commit").read_text() == "{'step': 12}"


class Stager(CheckpointStager):
    """One of another origin: state dicts that lie anywhere."""

    def __init__(self) -> None:
        self.kwargs: list[dict[str, Any]] = []
        self.closed = False
        self.fails = False

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> Future[dict[str, Any]]:
        self.kwargs.append(kwargs)
        future: Future[dict[str, Any]] = Future()
        if self.fails:
            future.set_exception(MemoryError("no memory"))
        else:
            future.set_result({k: torch.clone(v) for k, v in state_dict.items()})
        return future

    def close(self) -> None:
        self.closed = True


def test_a_stager_of_ones_own_and_a_failure_that_nobody_looked_at(tmp_path: Path) -> None:
    stager = Stager()
    with make_async_checkpointer(CheckpointerConfig(process_config=CONFIG)) as made:
        process = made._process
        own = AsyncCheckpointer(stager, process, CheckpointReader(RankInfo(0, 1)))
        own.save(str(tmp_path / "c"), {"w": torch.ones(2)}, step=1)[1].result()
        assert stager.kwargs == [{"step": 1}]
        assert own.load(str(tmp_path / "c"))["w"].tolist() == [1.0, 1.0]
        stager.fails = True
        staged, written = own.save(str(tmp_path / "c"), {"w": torch.ones(2)})
        assert isinstance(staged.exception(), MemoryError)
        with pytest.raises(MemoryError, match="no memory"):
            own.close()  # of the write, which nobody has asked about
        assert written.done()
        assert stager.closed
        own.close()
        with pytest.raises(UsageError, match="checkpointer is closed"):
            own.save(str(tmp_path / "c"), {"w": torch.ones(2)})


def test_the_default_writer_has_the_configs_barrier_and_timeouts(tmp_path: Path) -> None:
    config = CheckpointerConfig(
        writer_config=CheckpointWriterConfig(write_barrier_timeout_secs=2),
        barrier_config=BarrierConfig("tcp_store", tcp_args(free_port())),
        process_config=CONFIG,
    )
    with make_async_checkpointer(config, rank_info=RankInfo(0, 2)) as checkpointer:
        _, written = checkpointer.save(str(tmp_path / "c"), {"a": 1})
        error = written.exception()
    assert isinstance(error, CheckpointException)
    assert (error.kind, list(error.failures)) == ("timeout", [1])
    with pytest.raises(UsageError, match="unknown barrier type"):
        make_async_checkpointer(CheckpointerConfig(barrier_config=BarrierConfig("nope")))


def test_a_program_that_ends_without_closing_waits_for_its_write(tmp_path: Path) -> None:
    program = (
        "import torch, dcp_engine\n"
        "checkpointer = dcp_engine.make_async_checkpointer()\n"
        "checkpointer.save('c', {'w': torch.ones(3)})\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)
    into = {"w": torch.zeros(3)}
    dcp.load(into, checkpoint_id=tmp_path / "c")
    assert into["w"].tolist() == [1.0] * 3


def test_the_default_stager_stages_at_once_or_in_the_background() -> None:
    state = {"w": torch.arange(3), "x": {"y": [1]}}
    with DefaultStager(CheckpointStagerConfig(use_async_staging=False)) as stager:
        staged = stager.stage(state, step=1)
        assert isinstance(staged, StagedStateDict)
        assert staged["w"].tolist() == [0, 1, 2]
        state["w"].zero_()
        state["x"]["y"].append(2)
        assert staged["w"].tolist() == [0, 1, 2]
        assert staged["x"] == {"y": [1]}
    with pytest.raises(UsageError, match="stager is closed"):
        stager.stage(state)
    with DefaultStager() as stager:
        future = stager.stage(state)
        assert isinstance(future, Future)
        assert not future.cancel()
        assert future.result()["w"].tolist() == [0, 0, 0]


def test_a_wrapped_future_has_the_outcome_and_not_the_value() -> None:
    assert wrap_future({"any": "thing"}).result() is None
    original: Future[int] = Future()
    wrapped = wrap_future(original)
    assert not wrapped.done()
    original.set_result(5)
    assert wrapped.result() is None
    failing: Future[int] = Future()
    failing.set_exception(KeyboardInterrupt())
    assert isinstance(wrap_future(failing).exception(), KeyboardInterrupt)
    failed = wrap_future(failing)
    assert isinstance(failed.unseen_failure(), KeyboardInterrupt)
    failed.exception()
    assert failed.unseen_failure() is None


def test_the_names_are_at_the_top_too() -> None:
    import dcp_engine.checkpointer as layer

    # The engine has a stager of this name, which async_save takes.
    for name in set(layer.__all__) - {"DefaultStager", "wrap_future"}:
        assert getattr(dcp, name) is getattr(layer, name)
        assert name in dcp.__all__
