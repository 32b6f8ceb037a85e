"""What a callback of a save's future may do: it runs on the thread of the saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from tests.async_saver.states import assert_holds, every_kind, held_writer

LIMIT = 20


@pytest.fixture
def engine() -> Iterator[dcp.Engine]:
    made = dcp.Engine(max_pending=2, drain_timeout=LIMIT)
    yield made
    made.close()


def none_left(nbytes: int) -> None:
    """For ``require_memory``."""
    raise dcp.StagingError("no memory", kind="out_of_memory")


def called_back(engine: dcp.Engine, path: Path, call: Callable[[], Any]) -> Future[Any]:
    """What ``call`` came to in a callback of a save, behind which another one waits."""
    told: Future[Any] = Future()

    def run(response: Future[Any]) -> None:
        try:
            told.set_result(call())
        except BaseException as error:
            told.set_exception(error)

    writer, entered, released = held_writer(path / "first")
    first = engine.async_save(every_kind(1), storage_writer=writer)
    first.add_done_callback(run)
    assert entered.wait(LIMIT)
    second = engine.async_save(every_kind(2), checkpoint_id=path / "second")
    released.set()
    first.result(LIMIT)
    assert told.exception(LIMIT) is None or isinstance(told.exception(), dcp.UsageError)
    second.result(LIMIT)
    assert_holds(path / "second", 2)
    return told


def test_another_save(engine: dcp.Engine, tmp_path: Path) -> None:
    told = called_back(
        engine,
        tmp_path,
        lambda: engine.async_save(every_kind(3), checkpoint_id=tmp_path / "third"),
    )
    told.result().result(LIMIT)
    assert_holds(tmp_path / "third", 3)


def test_close_is_refused_and_nothing_is_lost(engine: dcp.Engine, tmp_path: Path) -> None:
    told = called_back(engine, tmp_path, engine.close)
    with pytest.raises(dcp.UsageError, match="callback") as caught:
        told.result()
    assert caught.value.hint is not None
    assert not engine.closed
    engine.async_save(every_kind(3), checkpoint_id=tmp_path / "third").result(LIMIT)


def test_warmup_of_a_worker_is_refused(engine: dcp.Engine, tmp_path: Path) -> None:
    kind = dcp.AsyncCheckpointerType.PROCESS
    state = every_kind(0)
    told = called_back(engine, tmp_path, lambda: engine.warmup(state, async_checkpointer_type=kind))
    with pytest.raises(dcp.UsageError, match="callback"):
        told.result()
    assert engine.worker_pid is None


def test_warmup_of_memory(engine: dcp.Engine, tmp_path: Path) -> None:
    kind = dcp.AsyncCheckpointerType.THREAD
    state = every_kind(0)
    told = called_back(engine, tmp_path, lambda: engine.warmup(state, async_checkpointer_type=kind))
    assert told.result() is None


def test_a_save_that_its_caller_waits_for_is_refused(
    engine: dcp.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"w": torch.ones(1 << 20)}

    def save_without_memory() -> dcp.AsyncSaveResponse:
        with monkeypatch.context() as patch:
            patch.setattr("dcp_engine.staging.arena.require_memory", none_left)
            return engine.async_save(large, checkpoint_id=tmp_path / "third", on_low_memory="sync")

    told = called_back(engine, tmp_path, save_without_memory)
    with pytest.raises(dcp.UsageError, match="callback"):
        told.result()
    assert not (tmp_path / "third" / "manifest.json").exists()
    engine.async_save(large, checkpoint_id=tmp_path / "third").result(LIMIT)
