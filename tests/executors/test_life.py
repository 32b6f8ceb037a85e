"""How a worker process begins and ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dcp_engine.errors import UsageError
from dcp_engine.executors.process import (
    WorkerError,
    WorkerProcess,
    WorkerSettings,
    parent,
    standstill,
)
from tests.executors.conftest import LIMIT, ROOT, Make


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


class Call:
    """A call on a thread of its own that has reached the handler."""

    def __init__(self, worker: WorkerProcess, kind: str, body: bytes = b"") -> None:
        self.entered = threading.Event()
        self._executor = ThreadPoolExecutor(1)
        self.future = self._executor.submit(
            worker.call, kind, body, on_progress=lambda _: self.entered.set(), timeout=LIMIT
        )
        assert self.entered.wait(LIMIT)
        self._executor.shutdown(wait=False)

    def failure(self) -> WorkerError:
        error = self.future.exception(LIMIT)
        assert isinstance(error, WorkerError)
        return error


# -- starting ----------------------------------------------------------------------------------


def test_the_whole_package_in_a_worker() -> None:
    """Without the shortcut of the other tests: as users start it."""
    settings = WorkerSettings(handler="tests.executors.handlers:tools", name="whole")
    with WorkerProcess(settings) as worker:
        assert worker.pid is not None  # start has returned before the worker is up
        assert not worker.started.done()
        assert worker.call("echo", b"first", timeout=LIMIT) == b"first"
        assert worker.started.result(0) == worker.pid


def test_starting_again_is_nothing(make: Make) -> None:
    worker = make()
    pid = worker.pid
    worker.start()
    assert worker.pid == pid


def test_the_thread_that_started_it_may_end(make: Make) -> None:
    """A death signal of Linux would follow that thread, not the process."""
    worker = WorkerProcess(make().settings)
    starter = threading.Thread(target=worker.start)
    starter.start()
    starter.join(LIMIT)
    with worker:
        assert worker.call("echo", b"alive", timeout=LIMIT) == b"alive"


def test_before_the_start() -> None:
    worker = WorkerProcess(WorkerSettings(handler="m:f", name="idle"))
    assert (worker.alive, worker.pid) == (False, None)
    with pytest.raises(UsageError, match="was not started"):
        worker.call("echo")
    worker.close()
    with pytest.raises(WorkerError, match='"idle" did not start: it was closed'):
        worker.started.result(0)
    with pytest.raises(UsageError, match="is closed"):
        worker.start()


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        ("broken", "LookupError: nothing to work with: words"),
        ("no.such.module:factory", "No module named 'no'"),
        ("tests.executors.handlers:nobody", "has no attribute 'nobody'"),
    ],
)
def test_a_factory_that_fails(make: Make, handler: str, text: str) -> None:
    worker = make(handler, init=b"words", ready=False)
    error = worker.started.exception(LIMIT)
    assert isinstance(error, WorkerError)
    assert error.kind == "worker_start"
    assert "Traceback" in str(error)
    assert text in str(error)
    with pytest.raises(WorkerError, match="did not start"):
        worker.call("echo")
    until(lambda: not worker.alive)


def test_a_package_that_cannot_be_imported(make: Make, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['dcp_engine'] = None\n")
    worker = make(ready=False, environment={"PYTHONPATH": str(tmp_path)})
    error = worker.started.exception(LIMIT)
    assert isinstance(error, WorkerError)
    assert "'dcp_engine' is not a package" in str(error)


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    from multiprocessing import spawn

    monkeypatch.setattr(spawn, "get_executable", lambda: "/no/such/python")
    worker = WorkerProcess(WorkerSettings(handler="m:f", name="none"))
    before = len(os.listdir("/proc/self/fd"))
    worker.start()
    assert len(os.listdir("/proc/self/fd")) == before
    error = worker.started.exception(0)
    assert isinstance(error, WorkerError)
    assert "FileNotFoundError" in str(error)
    with pytest.raises(WorkerError, match="did not start"):
        worker.call("echo")
    worker.close()


def test_a_start_that_takes_too_long(make: Make) -> None:
    worker = make("slow", ready=False, start_timeout=0.5)
    error = worker.started.exception(LIMIT)
    assert isinstance(error, WorkerError)
    assert error.kind == "worker_start"
    assert "it was not up after 0.5 s" in str(error)
    assert worker.pid is not None
    assert gone(worker.pid)


def test_large_initial_data(make: Make) -> None:
    worker = make(init=b"x" * (3 << 20))
    assert worker.call("echo", b"up", timeout=LIMIT) == b"up"


# -- dying -------------------------------------------------------------------------------------


def test_killed_while_it_starts(make: Make) -> None:
    worker = make("slow", ready=False)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    error = worker.started.exception(LIMIT)
    assert isinstance(error, WorkerError)
    assert error.kind == "worker_start"
    assert "was killed by SIGKILL" in str(error)


def test_killed_while_it_waits(make: Make) -> None:
    worker = make()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: not worker.alive)
    for _ in range(2):  # it stays dead
        with pytest.raises(WorkerError, match=f"pid {worker.pid}.* was killed by SIGKILL") as died:
            worker.call("echo")
        assert died.value.kind == "worker_died"
    worker.start()
    assert not worker.alive
    worker.close()


def test_killed_while_it_works(make: Make) -> None:
    worker = make(rank=5)
    call = Call(worker, "stay")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    error = call.failure()
    assert error.kind == "worker_died"
    assert error.rank == 5
    assert f'"test" (pid {worker.pid}) was killed by SIGKILL' in str(error)
    assert 'with request 1 ("stay") in flight' in str(error)


@pytest.mark.parametrize(("how", "text"), [(b"exit", "exit status 9"), (b"kill", "SIGKILL")])
def test_a_handler_that_takes_the_process_along(make: Make, how: bytes, text: str) -> None:
    with pytest.raises(WorkerError, match=text) as died:
        make().call("die", how, timeout=LIMIT)
    assert died.value.kind == "worker_died"


def test_the_next_worker_works(make: Make) -> None:
    with pytest.raises(WorkerError):
        make().call("die", timeout=LIMIT)
    assert make().call("echo", b"new", timeout=LIMIT) == b"new"


def test_killed_in_the_middle_of_a_message(make: Make) -> None:
    """It does not read, so that a large body stays in the way."""
    worker = make()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as executor:
        call = executor.submit(worker.call, "echo", bytes(8 << 20), timeout=LIMIT)
        os.kill(worker.pid, signal.SIGKILL)
        error = call.exception(LIMIT)
    assert isinstance(error, WorkerError)
    assert error.kind == "worker_died"


def test_a_worker_that_does_not_read_is_given_up(make: Make) -> None:
    worker = make()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="within") as late:
        worker.call("echo", b"small", timeout=0.05)
    assert late.value.kind == "timeout"
    assert worker.alive  # it has the whole message, and may yet wake up
    with pytest.raises(WorkerError) as late:
        worker.call("echo", bytes(8 << 20), timeout=0.05)
    assert late.value.kind == "timeout"
    until(lambda: not worker.alive)
    with pytest.raises(WorkerError, match="SIGKILL") as died:
        worker.call("echo")
    assert died.value.kind == "worker_died"


@pytest.mark.parametrize("size", [1, 8 << 20])
def test_a_worker_that_is_stopped_for_too_long_is_killed(make: Make, size: int) -> None:
    """Before it has taken the request, or behind it."""
    worker = make(rank=5)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match=r'stopped for .* s, with "echo" in') as stopped:
        worker.call("echo", bytes(size), stall_timeout=0.1)
    assert (stopped.value.kind, stopped.value.rank) == ("stalled", 5)
    until(lambda: not worker.alive)


def test_only_a_worker_that_is_not_stopped_has_a_grace(make: Make) -> None:
    worker = make()
    assert worker.pid is not None
    assert worker.call("echo", b"late", timeout=0.0, grace=LIMIT) == b"late"
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="no answer") as late:
        worker.call("echo", timeout=0.0, grace=LIMIT * 100)
    assert late.value.kind == "timeout"


def test_a_stop_counts_while_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, now = [False], [0.0]
    monkeypatch.setattr(standstill, "is_stopped", lambda pid: stopped[0])
    look = standstill.Standstill(1, 3.0, now=lambda: now[0])

    def looked(after: float, *, is_stopped: bool) -> bool:
        now[0] += after
        stopped[0] = is_stopped
        return look.look()

    assert not looked(10.0, is_stopped=True)
    assert not looked(1.0, is_stopped=True)
    assert not looked(1.0, is_stopped=False)
    assert look.seconds == 0.0, "it went on"
    assert not looked(1.0, is_stopped=True)
    assert not looked(1000.0, is_stopped=True), "this process did not run either"
    assert looked(1.0, is_stopped=True)
    forever = standstill.Standstill(1, None, now=lambda: now[0])
    forever.look()
    now[0] += 1.0
    assert not forever.look()


def test_processes_that_are_not_stopped() -> None:
    assert not standstill.is_stopped(os.getpid())
    assert not standstill.is_stopped(-1)


# -- closing -----------------------------------------------------------------------------------


def test_closing_lets_the_handler_close(make: Make, tmp_path: Path) -> None:
    note = tmp_path / "note"
    worker = make(init=str(note).encode())
    worker.close()
    assert note.read_text() == "closed"
    assert not worker.alive
    assert worker.pid is not None
    assert gone(worker.pid)
    worker.close()
    with pytest.raises(UsageError, match="is closed"):
        worker.call("echo")


def test_closing_waits_for_the_request_in_flight(make: Make, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    worker = make()
    call = Call(worker, "say_and_wait", str(flag).encode())
    closing = threading.Thread(target=worker.close, daemon=True)
    closing.start()
    flag.unlink()
    assert call.future.result(LIMIT) == b"gone"
    closing.join(LIMIT)
    assert not worker.alive


def test_closing_kills_what_does_not_end(make: Make) -> None:
    worker = make()
    call = Call(worker, "stay")
    worker.close(0.05)
    assert call.failure().kind == "worker_died"
    assert not worker.alive


def test_closing_kills_what_is_stopped(make: Make) -> None:
    worker = make()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    worker.close(0.05)
    assert gone(worker.pid)


def test_closing_does_not_wait_for_what_is_stopped(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Unless somebody waits for an answer, who minds for how long it may be stopped."""
    monkeypatch.setattr(parent, "LOOK_S", 0.01)
    monkeypatch.setattr(parent, "_STOPPED_S", 0.02)
    flag = tmp_path / "flag"
    flag.touch()
    worker = make(shutdown_timeout=1000.0)
    assert worker.pid is not None
    call = Call(worker, "say_and_wait", str(flag).encode())
    os.kill(worker.pid, signal.SIGSTOP)
    closing = threading.Thread(target=worker.close, daemon=True)
    closing.start()
    closing.join(0.2)
    assert worker.alive, "it may go on yet"
    flag.unlink()
    os.kill(worker.pid, signal.SIGCONT)
    assert call.future.result(LIMIT) == b"gone"
    closing.join(LIMIT)
    assert not worker.alive
    idle = make(shutdown_timeout=1000.0)
    assert idle.pid is not None
    os.kill(idle.pid, signal.SIGSTOP)
    idle.close()
    assert gone(idle.pid)


def test_closing_a_worker_that_is_not_up_does_not_wait_for_it(make: Make) -> None:
    worker = make("slow", ready=False, shutdown_timeout=1000.0)
    worker.close()
    with pytest.raises(WorkerError, match="closed before it was up"):
        worker.started.result(0)


def test_closing_from_a_callback(make: Make) -> None:
    worker = make(ready=False)
    worker.started.add_done_callback(lambda _: worker.close())
    until(lambda: not worker.alive)


def test_nothing_is_left(make: Make) -> None:
    """Descriptors, threads, processes, names in shared memory."""

    def what_there_is() -> tuple[int, int, list[str]]:
        return (
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            # Only what torch and multiprocessing would leave: others use the place too.
            [name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "psm_"))],
        )

    before = what_there_is()
    for end in ("close", "kill", "fail"):
        worker = make("broken" if end == "fail" else "tools", ready=end != "fail")
        if end == "kill":
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        if end != "close":
            until(lambda worker=worker: not worker.alive)
        worker.close()
        with pytest.raises(ChildProcessError):
            os.waitpid(worker.pid or 0, os.WNOHANG)
    assert what_there_is() == before


def test_a_fork_has_no_part_in_it(make: Make) -> None:
    worker = make()
    pid = os.fork()
    if pid == 0:
        try:
            worker.close()
            worker.call("echo")
        except UsageError as error:
            os._exit(0 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert worker.call("echo", b"still", timeout=LIMIT) == b"still"


# -- the parent's end --------------------------------------------------------------------------

_PARENT = """
import os, sys, threading
from dcp_engine.executors.process import WorkerProcess, WorkerSettings

how = sys.argv[1]
worker = WorkerProcess(WorkerSettings(
    handler="tests.executors.handlers:" + ("slow" if how == "starting" else "tools"), name="orphan"
))
worker.start()
if how != "starting":
    worker.started.result(60)
if how in ("working", "forked"):
    entered = threading.Event()
    threading.Thread(
        target=worker.call, args=("stay",), kwargs=dict(on_progress=lambda _: entered.set()),
        daemon=True,
    ).start()
    entered.wait(60)
forked = 0
if how == "forked":
    forked = os.fork()
    if forked == 0:
        import signal
        signal.pause()  # holds the socket, as a data loader's process does
print(worker.pid, forked, flush=True)
if how != "exits":
    threading.Event().wait()
"""


def orphan(how: str, light: dict[str, str]) -> tuple[subprocess.Popen[str], int, int]:
    """A process with a worker; both, and what it forked."""
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, how],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **light},
    )
    assert parent.stdout is not None
    worker, forked = map(int, parent.stdout.readline().split())
    return parent, worker, forked


def finish(parent: subprocess.Popen[str], forked: int) -> None:
    parent.kill()
    parent.wait(LIMIT)
    assert parent.stdout is not None
    parent.stdout.close()
    if forked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(forked, signal.SIGKILL)


@pytest.mark.parametrize("how", ["starting", "idle", "working", "forked"])
def test_the_worker_ends_with_its_parent(how: str, light: dict[str, str]) -> None:
    parent, worker, forked = orphan(how, light)
    try:
        watched = os.pidfd_open(worker)
        try:
            parent.kill()
            assert select.select([watched], [], [], LIMIT)[0]
        finally:
            os.close(watched)
    finally:
        finish(parent, forked)


def test_the_worker_does_not_keep_its_parent(light: dict[str, str]) -> None:
    parent, worker, _ = orphan("exits", light)
    try:
        assert parent.wait(LIMIT) == 0
        until(lambda: gone(worker))
    finally:
        finish(parent, 0)


def test_without_a_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel that has none: an orphan sees that it was adopted."""
    from dcp_engine.executors.process import manners

    def none(pid: int) -> Any:
        raise OSError("not here")

    monkeypatch.setattr(os, "pidfd_open", none)
    assert manners.process_descriptor(1) is None
    manners.wait_for_end(os.getppid() + 1, None)  # returns: the parent is another one
