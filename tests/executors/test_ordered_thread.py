"""Callables one after another."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future

import pytest

from dcp_engine.errors import UsageError
from dcp_engine.executors.ordered_thread import OrderedThread

LIMIT = 20.0


@pytest.fixture
def thread() -> Iterator[OrderedThread]:
    with OrderedThread("test") as ordered:
        yield ordered


class Gate:
    """A callable that says when it runs and waits to be let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.open.wait(LIMIT)
        return "through"


def test_in_order_on_one_thread(thread: OrderedThread) -> None:
    seen: list[tuple[int, str]] = []

    def note(number: int) -> Callable[[], int]:
        def run() -> int:
            seen.append((number, threading.current_thread().name))
            return number

        return run

    futures = [thread.submit(note(number)) for number in range(50)]
    assert [future.result(LIMIT) for future in futures] == list(range(50))
    assert seen == [(number, "test") for number in range(50)]
    assert thread.wait_idle(LIMIT)
    assert thread.pending() == 0


def test_it_starts_with_the_first_callable() -> None:
    before = threading.active_count()
    with OrderedThread("lazy") as thread:
        assert threading.active_count() == before
        assert thread.wait_idle(0)
        thread.submit(lambda: None).result(LIMIT)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_is_raised_ends_in_the_future(
    thread: OrderedThread, error: type[BaseException]
) -> None:
    def boom() -> None:
        raise error("boom")

    failed, after = thread.submit(boom), thread.submit(lambda: "alive")
    assert isinstance(failed.exception(LIMIT), error)
    assert after.result(LIMIT) == "alive"


def test_what_runs_cannot_be_cancelled_and_what_waits_can(thread: OrderedThread) -> None:
    gate = Gate()
    running = thread.submit(gate)
    waiting = thread.submit(lambda: "never")
    assert gate.entered.wait(LIMIT)
    assert thread.pending() == 2
    assert not running.cancel()
    assert waiting.cancel()
    gate.open.set()
    assert running.result(LIMIT) == "through"
    with pytest.raises(CancelledError):
        waiting.result(LIMIT)
    assert thread.wait_idle(LIMIT)


def test_close_says_what_is_left() -> None:
    thread, gate = OrderedThread("busy"), Gate()
    running = thread.submit(gate)
    assert gate.entered.wait(LIMIT)
    assert not thread.wait_idle(0)
    assert not thread.close(0)
    with pytest.raises(UsageError, match="busy is closed"):
        thread.submit(lambda: None)
    gate.open.set()
    assert thread.close(LIMIT)
    assert running.result(0) == "through"
    assert thread.close(0)


def test_closing_drains() -> None:
    thread = OrderedThread("drained")
    futures = [thread.submit(lambda number=number: number) for number in range(20)]
    assert thread.close()
    assert [future.result(0) for future in futures] == list(range(20))
    assert OrderedThread("never used").close(0)


def test_it_knows_itself(thread: OrderedThread) -> None:
    assert not thread.is_current(), "it has not started"
    assert thread.submit(thread.is_current).result(LIMIT)
    assert not thread.is_current()
    called_back: Future[bool] = Future()
    gate = Gate()
    running = thread.submit(gate)
    assert gate.entered.wait(LIMIT)
    running.add_done_callback(lambda _: called_back.set_result(thread.is_current()))
    gate.open.set()
    assert called_back.result(LIMIT), "callbacks run on it"


def test_it_does_not_wait_for_itself(thread: OrderedThread) -> None:
    assert thread.submit(lambda: thread.wait_idle()).result(LIMIT) is False
    assert thread.submit(lambda: thread.close()).result(LIMIT) is False
    with pytest.raises(UsageError):
        thread.submit(lambda: None)


def test_results_do_not_live_on(thread: OrderedThread) -> None:
    import gc
    import weakref

    class Large:
        pass

    value = Large()
    alive = weakref.ref(value)

    def use(value: Large = value) -> None:
        return None

    thread.submit(use).result(LIMIT)
    assert thread.wait_idle(LIMIT)
    del value, use
    gc.collect()
    assert alive() is None


_SCRIPT = """
import atexit, importlib.util, sys, types

# The package itself would import torch, which takes seconds and is not wanted here.
package = types.ModuleType("dcp_engine")
package.__path__ = [sys.argv[1] + "/dcp_engine"]
sys.modules["dcp_engine"] = package
from dcp_engine.executors.ordered_thread import OrderedThread

thread = OrderedThread("exit")
thread.submit(lambda: print("first", flush=True)).result(20)

def drain():
    thread.submit(lambda: print("at exit", flush=True))
    print("drained", thread.close(20), flush=True)

atexit.register(drain)
stuck = OrderedThread("stuck")
import threading
stuck.submit(threading.Event().wait)
"""


def test_at_the_end_of_the_program() -> None:
    """What is submitted at exit still runs; what never ends holds nobody up."""
    root = str(__import__("pathlib").Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, root], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["first", "at exit", "drained True", ""]
