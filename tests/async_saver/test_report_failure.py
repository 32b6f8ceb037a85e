"""A rank that failed before its save could begin: what it raises, and what it keeps."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.async_saver.job import SaveJob
from dcp_engine.async_saver.report_failure import report_failure
from dcp_engine.coordination.failures import capture, exception_of
from dcp_engine.coordination.interface import Deadlines
from dcp_engine.executors.ordered_thread import OrderedThread
from dcp_engine.saver.options import SaveOptions
from dcp_engine.saver.plan_memory import PlanMemory
from dcp_engine.state.adapters import GroupRanks


class Overtaken:
    """A session, and its operation, in which rank 1 has failed before anything is asked here."""

    def begin(self, *args: Any, **kwargs: Any) -> Overtaken:
        return self

    def step(self, *args: Any, **kwargs: Any) -> Any:
        raise exception_of([capture(1, OSError("rank 1 was first"))], doing="save", checkpoint="c")

    def __enter__(self) -> Overtaken:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


@pytest.fixture
def job() -> SaveJob:
    session: Any = Overtaken()
    return SaveJob(
        session=session,
        number=1,
        checkpoint_id="c",
        writer=dcp.FileSystemWriter("c"),
        group=GroupRanks(ranks=(0, 1), rank=0),
        world_size=2,
        memory=PlanMemory(),
        options=SaveOptions(deadlines=Deadlines(timeout=1.0, stall_timeout=1.0)),
    )


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["exit", "interrupt"])
def test_an_exit_of_its_own_is_raised_again(job: SaveJob, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        report_failure(job, error, "staging")
    assert caught.value is error


def test_any_other_error_gives_way_to_the_verdict(job: SaveJob) -> None:
    with pytest.raises(dcp.CheckpointException, match="rank 1 was first"):
        report_failure(job, ValueError("rank 0 came second"), "staging")


def test_a_save_that_no_thread_takes_keeps_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the interpreter ends; here it goes on."""
    state = {"w": torch.ones(4)}

    def refuse(thread: OrderedThread, fn: Any) -> Any:
        raise dcp.UsageError("no thread left")

    with dcp.Engine() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(OrderedThread, "submit", refuse)
            with pytest.raises(dcp.UsageError, match="no thread left"):
                engine.async_save(state, checkpoint_id=tmp_path)
        engine.async_save(state, checkpoint_id=tmp_path, timeout=5).result(5)
