"""A checkpoint process and its child: real ones."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.checkpointer import (
    CheckpointProcess,
    CheckpointProcessConfig,
    CheckpointStagerConfig,
    CheckpointWriter,
    DefaultStager,
    RankInfo,
    RequestType,
    WorkerRequest,
    WorkerResponse,
)
from dcp_engine.checkpointer.builder import default_subprocess_init_fn, default_writer_init_fn
from dcp_engine.errors import (
    CheckpointException,
    CoordinationError,
    StorageError,
    UnsupportedStateError,
    UsageError,
)
from tests.checkpointer import children

ALONE = RankInfo(0, 1)
CONFIG = CheckpointProcessConfig(subprocess_init_timeout_secs=120)
BLOCKING = CheckpointStagerConfig(use_async_staging=False)


def process_of(
    writer: Callable[..., Any] = default_writer_init_fn,
    init: Callable[..., Any] = default_subprocess_init_fn,
    init_args: tuple[Any, ...] = (),
    config: CheckpointProcessConfig = CONFIG,
    **writer_args: Any,
) -> CheckpointProcess:
    return CheckpointProcess(ALONE, config, init, init_args, writer, writer_args)


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def hooked(marks: Path) -> Iterator[CheckpointProcess]:
    """One child for many tests: its writer has a hook that does what it is told."""
    with process_of(
        children.hooked_writer, children.set_up, (str(marks), "hello"), directory=str(marks)
    ) as process:
        yield process


@pytest.fixture(scope="module")
def own(marks: Path) -> Iterator[CheckpointProcess]:
    """One whose writer shows and changes what it gets."""
    with process_of(children.own_writer, directory=str(marks)) as process:
        yield process


def loaded(path: Path, *names: str) -> list[Any]:
    state: dict[str, Any] = dict.fromkeys(names)
    dcp.load(state, checkpoint_id=path)
    return list(state.values())


def test_the_child_writes_what_dcp_engine_loads(hooked: CheckpointProcess, tmp_path: Path) -> None:
    state = {"w": torch.arange(5.0), "nested": {"step": [1, 2]}, "rng": torch.get_rng_state()}
    assert hooked.write(state, str(tmp_path / "c")).result() is None
    into = {"w": torch.zeros(5), "nested": {"step": None}, "rng": torch.zeros_like(state["rng"])}
    dcp.load(into, checkpoint_id=tmp_path / "c")
    assert torch.equal(into["w"], state["w"])
    assert torch.equal(into["rng"], state["rng"])
    assert into["nested"] == state["nested"]


def test_keyword_arguments_reach_the_writer_and_its_hook(
    hooked: CheckpointProcess, tmp_path: Path, marks: Path
) -> None:
    hooked.write({"a": 1}, str(tmp_path / "c"), step=3, tags=("x",)).result()
    for when in ("pre_commit", "post_commit"):
        assert (marks / when).read_text() == "{'step': 3, 'tags': ('x',)}"


def test_the_init_function_ran_in_the_child_with_its_arguments(
    hooked: CheckpointProcess, marks: Path
) -> None:
    hooked.process_creation_future.result()
    assert (marks / "initialized").read_text() == f"hello {hooked.pid}"
    assert hooked.pid != os.getpid()


def test_a_write_that_fails_ends_neither_the_child_nor_the_next_write(
    hooked: CheckpointProcess, tmp_path: Path
) -> None:
    hooked.ping(60)
    pid = hooked.pid
    failed = hooked.write({"a": 1}, str(tmp_path / "c"), fail="now")
    error = failed.exception()
    assert isinstance(error, CheckpointException)
    cause, _ = error.failures[0]
    assert (type(cause), str(cause)) == (RuntimeError, "asked to fail: now")
    strange = hooked.write({"a": 1}, str(tmp_path / "c"), unpicklable=True).exception()
    assert isinstance(strange, CheckpointException)
    assert "Unpicklable" in str(strange)
    assert not (tmp_path / "c" / "manifest.json").exists()
    hooked.write({"a": 2}, str(tmp_path / "c")).result()
    assert loaded(tmp_path / "c", "a") == [2]
    assert hooked.pid == pid


def test_nothing_piles_up_in_the_child(hooked: CheckpointProcess, tmp_path: Path) -> None:
    def write(state: Any, **kwargs: Any) -> int:
        hooked.write(state, str(tmp_path / "c"), **kwargs).exception()
        return len(list(Path(f"/proc/{hooked.pid}/fd").iterdir()))

    write({"w": torch.ones(9)})
    before = write({"w": torch.ones(9)})
    with DefaultStager(BLOCKING) as stager:  # another arena, whose first writes fail
        counts = [write(stager.stage({"w": torch.ones(9)}), fail="yes") for _ in range(3)]
        assert counts == [before + 1] * 3
    assert write({"w": torch.ones(9)}) == before  # the child lets go of it


def test_a_child_that_died_is_replaced_and_costs_no_write(
    hooked: CheckpointProcess, tmp_path: Path
) -> None:
    hooked.ping(60)
    before = hooked.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    hooked.write({"a": 3}, str(tmp_path / "c")).result()
    assert loaded(tmp_path / "c", "a") == [3]
    assert hooked.pid not in (None, before)
    hooked.process_creation_future.result()


def test_a_child_that_dies_in_a_write_fails_that_write_alone(
    hooked: CheckpointProcess, tmp_path: Path
) -> None:
    hooked.write({"a": 4}, str(tmp_path / "c")).result()
    error = hooked.write({"a": 5}, str(tmp_path / "c"), die=True).exception()
    assert isinstance(error, CheckpointException)
    assert error.kind == "worker_died"
    assert "exit status 7" in str(error)
    assert "write_checkpoint" in str(error)
    assert loaded(tmp_path / "c", "a") == [4]
    hooked.write({"a": 6}, str(tmp_path / "c")).result()
    assert loaded(tmp_path / "c", "a") == [6]


def test_tensors_in_a_staging_arena_are_the_same_memory_on_both_sides(
    own: CheckpointProcess, marks: Path
) -> None:
    with DefaultStager(BLOCKING) as stager:
        staged = stager.stage({"w": torch.tensor([1.0, 2.0])})
        own.write(staged, "same-memory").result()
        assert (marks / "same-memory").read_text() == "Tensor [1.0, 2.0]"
        assert staged["w"].tolist() == [-1.0, -2.0]  # the child's doing
        # Larger: the arena grows, and the child follows.
        large = torch.ones(3 << 20)
        staged = stager.stage({"w": torch.tensor([3.0]), "large": large})
        own.write(staged, "grown").result()
        assert staged["w"].tolist() == [-3.0]
        assert (marks / "grown").read_text() == "Tensor [3.0]"


def test_other_tensors_are_staged_first_and_stay_as_they_are(
    own: CheckpointProcess, marks: Path
) -> None:
    tensor = torch.tensor([1.0, 2.0])
    written = own.write({"w": tensor}, "staged-first", sleep=0.2)
    tensor.zero_()  # at once
    written.result()
    assert (marks / "staged-first").read_text() == "Tensor [1.0, 2.0]"
    assert tensor.tolist() == [0.0, 0.0]


def test_futures_of_state_dicts_are_waited_for_in_order(
    own: CheckpointProcess, marks: Path
) -> None:
    later: Future[dict[str, Any]] = Future()
    first = own.write(later, "of-a-future")
    second = own.write({"w": torch.tensor([2.0])}, "behind-it")
    assert not first.done()
    later.set_result({"w": torch.tensor([1.0])})
    second.result()
    assert first.done()
    assert (marks / "of-a-future").read_text() == "Tensor [1.0]"
    failing: Future[dict[str, Any]] = Future()
    failing.set_exception(MemoryError("staging failed"))
    assert isinstance(own.write(failing, "x").exception(), MemoryError)
    with DefaultStager() as stager:
        own.write(stager.stage({"w": torch.tensor([4.0])}), "in-background").result()
    assert (marks / "in-background").read_text() == "Tensor [4.0]"


def test_staging_memory_is_kept_until_it_is_written(own: CheckpointProcess, marks: Path) -> None:
    with DefaultStager(BLOCKING) as stager:
        first = own.write(stager.stage({"w": torch.tensor([1.0])}), "kept-1", sleep=0.3)
        # One copy at a time: this waits until the first is written.
        staged = stager.stage({"w": torch.tensor([2.0])})
        first.result()
        own.write(staged, "kept-2").result()
        stager.stage({"w": torch.tensor([3.0])})
        with pytest.raises(UsageError, match="overwritten by a later stage"):
            own.write(staged, "stale")
    assert (marks / "kept-1").read_text() == "Tensor [1.0]"
    assert (marks / "kept-2").read_text() == "Tensor [2.0]"


def test_what_cannot_be_sent_is_refused_by_name(own: CheckpointProcess) -> None:
    with pytest.raises(UsageError, match="cannot be sent"):
        own.write({"w": torch.ones(1)}, "x", callback=lambda: 0)
    with pytest.raises(UnsupportedStateError) as caught:
        own.write({"w": torch.ones(1), "bad": {"f": (x for x in "ab")}}, "x")
    assert caught.value.tensor == "bad.f"
    own.ping(60)


def test_memory_of_a_process_is_no_place_for_its_child(hooked: CheckpointProcess) -> None:
    error = hooked.write({"a": 1}, "memory://in-a-child").exception()
    assert isinstance(error, CheckpointException)
    cause, _ = error.failures[0]
    assert isinstance(cause, StorageError)
    assert "memory" in str(cause)


def test_a_start_that_fails_tells_the_childs_traceback(tmp_path: Path) -> None:
    with process_of(init=children.fail_to_set_up) as process:
        error = process.process_creation_future.exception(120)
        assert isinstance(error, CoordinationError)
        assert error.kind == "worker_start"
        assert "the child cannot be set up" in str(error)
        assert "in fail_to_set_up" in str(error)
        # A write tries again, and says the same.
        again = process.write({"a": 1}, str(tmp_path / "c")).exception(120)
        assert isinstance(again, CoordinationError)
        assert "the child cannot be set up" in str(again)


def test_a_start_that_takes_too_long_is_ended() -> None:
    config = CheckpointProcessConfig(subprocess_init_timeout_secs=0.3)
    with process_of(init=children.never_be_set_up, config=config) as process:
        error = process.process_creation_future.exception(60)
        assert isinstance(error, CoordinationError)
        assert error.kind == "worker_start"
        assert "not up after 0.3 s" in str(error)


def test_close_waits_for_writes_and_closes_the_writer(tmp_path: Path) -> None:
    process = process_of(children.own_writer, directory=str(tmp_path))
    written = process.write({"w": torch.ones(1)}, "last", sleep=0.2)
    process.close()
    assert written.done()
    assert written.exception() is None
    assert (tmp_path / "closed").exists()
    assert process.pid is None
    process.close()
    with pytest.raises(UsageError, match="is closed"):
        process.write({"w": torch.ones(1)}, "x")


def test_a_child_that_does_not_end_is_killed(tmp_path: Path) -> None:
    config = CheckpointProcessConfig(
        subprocess_init_timeout_secs=120, subprocess_shutdown_timeout_secs=0.5
    )
    process = process_of(children.own_writer, config=config, directory=str(tmp_path), hang=True)
    process.ping(120)
    pid = process.pid
    assert pid is not None
    process.close()
    eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_requests_are_of_three_types() -> None:
    assert {kind.name: kind.value for kind in RequestType} == {
        "PING": "ping",
        "WRITE_CHECKPOINT": "write_checkpoint",
        "TERMINATE_PROCESS": "exit",
    }
    assert WorkerRequest(RequestType.PING, {}).payload == {}
    assert WorkerResponse(RequestType.PING, True).error_msg is None


def test_what_is_not_importable_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="checkpoint_writer_init_fn"):
        process_of(lambda rank_info: CheckpointWriter)
