"""Asking a worker process. No test here harms it: all share one."""

from __future__ import annotations

import json
import os
import pickle
import queue
import random
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

from dcp_engine.errors import CheckpointException, CoordinationError, StorageError, UsageError
from dcp_engine.executors.process import WorkerError, WorkerFailure, WorkerProcess
from dcp_engine.executors.process.settings import DEFAULT_NICE, MAX_NICE
from tests.executors.conftest import LIMIT
from tests.executors.handlers import Quits


def about(worker: WorkerProcess) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(worker.call("about", timeout=LIMIT))
    return answer


def test_where_a_handler_runs(tools: WorkerProcess) -> None:
    seen = about(tools)
    assert seen["pid"] == tools.pid == tools.started.result(0)
    assert seen["parent"] == os.getpid()
    assert (seen["name"], seen["rank"], seen["init"]) == ("tools", 3, "hello")
    assert (seen["cuda"], seen["extra"]) == ("", "given")
    assert 1 <= int(seen["omp"]) <= 4
    assert seen["path"] == [entry or os.getcwd() for entry in sys.path]
    assert (seen["argv"], seen["cwd"]) == (sys.argv, os.getcwd())
    assert seen["thread"]
    assert tools.alive


def test_it_keeps_out_of_the_way(tools: WorkerProcess) -> None:
    seen = about(tools)
    assert seen["nice"] == min(os.getpriority(os.PRIO_PROCESS, 0) + DEFAULT_NICE, MAX_NICE)
    # Where each session has an equal share of the processors, that of the worker's is lowered.
    lowered = seen["autogroup"]
    assert lowered is None or lowered.split()[-2:] == ["nice", str(DEFAULT_NICE)]
    assert seen["io"] in (None, 3 << 13, 2 << 13 | 7)  # idle, or the lowest of the ordinary ones
    assert seen["comm"] == "tools"
    assert (seen["gc"], seen["frozen"]) == (False, True)


def test_signals_to_the_job_do_not_end_it(tools: WorkerProcess) -> None:
    seen = about(tools)
    assert seen["session"] == seen["pid"]  # no terminal, no process group of the parent's
    pid = tools.pid
    assert pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        assert seen["ignored"] & 1 << (number - 1)
        os.kill(pid, number)
    assert about(tools)["pid"] == pid


@pytest.mark.parametrize("size", [0, 1, 100_000, 20 << 20])
def test_bodies_of_any_size(tools: WorkerProcess, size: int) -> None:
    body = random.Random(size).randbytes(size)
    assert tools.call("echo", body, timeout=LIMIT) == body


def test_progress_comes_in_order_on_the_callers_thread(tools: WorkerProcess) -> None:
    seen: list[int] = []
    threads = set()

    def note(data: bytes) -> None:
        seen.append(int(data))
        threads.add(threading.get_ident())

    assert tools.call("count", b"500", on_progress=note, timeout=LIMIT) == b"done"
    assert seen == list(range(500))
    assert threads == {threading.get_ident()}
    assert tools.call("count", b"10", timeout=LIMIT) == b"done"


def test_a_listener_that_raises_ends_the_call_alone(tools: WorkerProcess) -> None:
    def refuse(data: bytes) -> None:
        raise ArithmeticError("enough")

    with pytest.raises(ArithmeticError, match="enough"):
        tools.call("count", b"50", on_progress=refuse, timeout=LIMIT)
    assert tools.call("echo", b"next", timeout=LIMIT) == b"next"


def caught(worker: WorkerProcess, name: str) -> BaseException:
    try:
        worker.call("fail", name.encode(), timeout=LIMIT)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("plain", KeyError, "'k'"),
        ("late", TimeoutError, "of the handler's own"),
        ("base", Quits, "out"),
        ("storage", StorageError, "no space"),
    ],
)
def test_what_the_handler_raises(
    tools: WorkerProcess, name: str, kind: type[BaseException], text: str
) -> None:
    error = caught(tools, name)
    assert type(error) is kind
    assert text in str(error)
    (note,) = error.__notes__
    assert note.startswith(f'Traceback in the worker process "tools" (pid {tools.pid})')
    assert "handlers.py" in note


def test_an_error_of_the_engine_keeps_what_it_knows(tools: WorkerProcess) -> None:
    error = caught(tools, "storage")
    assert isinstance(error, StorageError)
    assert (error.kind, error.file, error.hint) == ("disk_full", "f", "make room")


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        ("lock", "tests.executors.handlers.HoldsALock"),
        ("two arguments", "tests.executors.handlers.TwoArguments"),
        ("local", "tests.executors.handlers.Local"),
        ("exit", "builtins.SystemExit"),
        ("interrupt", "builtins.KeyboardInterrupt"),
        ("large", "builtins.ValueError"),
        ("mute", "tests.executors.handlers.Mute"),
    ],
)
def test_what_cannot_be_raised_here_arrives_as_text(
    tools: WorkerProcess, name: str, type_name: str
) -> None:
    error = caught(tools, name)
    assert type(error) is WorkerFailure
    assert error.type_name == type_name
    assert error.kind == "rank_failed"
    assert type_name.rsplit(".", 1)[1] in str(error)
    assert len(str(error)) < 2000
    assert tools.call("echo", b"alive", timeout=LIMIT) == b"alive"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.type_name) == (WorkerFailure, type_name)


def test_text_that_is_no_unicode_arrives(tools: WorkerProcess) -> None:
    assert isinstance(caught(tools, "surrogate"), ValueError)


def test_failures_of_ranks_keep_their_form(tools: WorkerProcess) -> None:
    error = caught(tools, "ranks")
    assert isinstance(error, CheckpointException)
    assert (list(error.failures), error.kind) == ([1], "io_error")
    cause = error.failures[1][0]
    assert isinstance(cause, CoordinationError)  # the original holds a lock
    assert "the disk of rank 1" in str(cause)
    assert error.__cause__ is cause


def test_an_answer_that_is_no_bytes(tools: WorkerProcess) -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        tools.call("wrong_type", timeout=LIMIT)


def test_descriptors_go_along(tools: WorkerProcess) -> None:
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as two:
        one.write(b"one")
        two.write(b"two")
        one.flush()
        two.flush()
        both = [one.fileno(), two.fileno()]
        assert tools.call("read", descriptors=both, timeout=LIMIT) == b"one|two"
        tools.call("write", b"THE", descriptors=[two.fileno()], timeout=LIMIT)
        assert os.pread(two.fileno(), 10, 0) == b"THE"
        large = b"x" * (5 << 20)
        tools.call("write", large, descriptors=[one.fileno()], timeout=LIMIT)
        assert os.pread(one.fileno(), len(large) + 1, 0) == large
    with pytest.raises(UsageError, match="254 descriptors"):
        tools.call("read", descriptors=[0] * 254, timeout=LIMIT)


def test_anonymous_memory_is_shared(tools: WorkerProcess) -> None:
    memory = os.memfd_create("test")
    try:
        os.ftruncate(memory, 1 << 20)
        tools.call("write", b"from there", descriptors=[memory], timeout=LIMIT)
        assert os.pread(memory, 10, 0) == b"from there"
    finally:
        os.close(memory)


def test_many_calls_leave_nothing(tools: WorkerProcess) -> None:
    def count() -> tuple[int, int]:
        theirs = int(tools.call("descriptors", timeout=LIMIT))
        return len(os.listdir("/proc/self/fd")), theirs

    with tempfile.TemporaryFile() as file:
        tools.call("read", descriptors=[file.fileno()], timeout=LIMIT)
        before = count()
        for number in range(200):
            tools.call("read", descriptors=[file.fileno()] * 3, timeout=LIMIT)
            body = b"x" * (number * 100)
            assert tools.call("echo", body, timeout=LIMIT) == body
        assert count() == before


def test_callers_have_their_turn_one_after_the_other(tools: WorkerProcess) -> None:
    answers: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()

    def ask(body: bytes) -> None:
        answers.put((body, tools.call("echo", body, timeout=LIMIT)))

    threads = [
        threading.Thread(target=ask, args=(bytes([n]) * 200_000,), daemon=True) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    pairs = [answers.get(timeout=0) for _ in threads]
    assert all(sent == received for sent, received in pairs)
    assert len({sent for sent, _ in pairs}) == 8


def test_a_late_answer_is_dropped(tools: WorkerProcess, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    entered: list[bytes] = []
    with pytest.raises(WorkerError, match=r'no answer to "say_and_wait" within 0\.2 s') as failed:
        tools.call("say_and_wait", str(flag).encode(), on_progress=entered.append, timeout=0.2)
    assert failed.value.kind == "timeout"
    with pytest.raises(WorkerError, match=r"within 0\.01 s"):
        tools.call("echo", b"behind it", timeout=0.01)
    flag.unlink()
    assert tools.call("echo", b"mine", timeout=LIMIT) == b"mine"


def test_a_turn_can_come_too_late(tools: WorkerProcess, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    entered = threading.Event()

    def occupy() -> None:
        body = str(flag).encode()
        tools.call("say_and_wait", body, on_progress=lambda _: entered.set(), timeout=LIMIT)

    thread = threading.Thread(target=occupy, daemon=True)
    thread.start()
    assert entered.wait(LIMIT)
    with pytest.raises(WorkerError, match="waiting for its turn") as failed:
        tools.call("echo", timeout=0.01)
    assert failed.value.kind == "timeout"
    flag.unlink()
    thread.join(LIMIT)
    assert tools.call("echo", b"mine", timeout=LIMIT) == b"mine"


def test_the_note_is_printed_with_the_error(tools: WorkerProcess) -> None:
    text = "".join(traceback.format_exception(caught(tools, "plain")))
    assert "in handle" in text
    assert "the worker process" in text
