"""A call on a thread that gives way to the others."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from storage_backends.lowered_thread import run_lowered

linux = pytest.mark.skipif(sys.platform != "linux", reason="a thread has no nice value here")


def nice_value() -> int:
    """Of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@linux
@pytest.mark.parametrize("nice", [0, 2, 19, 100])
def test_only_the_call_is_lowered(nice: int) -> None:
    own, threads = nice_value(), threading.active_count()
    assert run_lowered(nice_value, nice) == min(own + nice, 19)
    assert nice_value() == own
    assert threading.active_count() == threads


@linux
def test_what_it_starts_is_lowered_too() -> None:
    seen: list[int] = []

    def start() -> None:
        thread = threading.Thread(target=lambda: seen.append(nice_value()))
        thread.start()
        thread.join()

    run_lowered(start, 3)
    assert seen == [min(nice_value() + 3, 19)]


def test_what_it_raises_comes_out() -> None:
    def fail() -> None:
        raise SystemExit("no")

    with pytest.raises(SystemExit, match="no"):
        run_lowered(fail, 1)


@linux
def test_a_refusal_of_the_system_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    assert run_lowered(nice_value, 5) == nice_value()


def test_without_threads_to_give_or_values_per_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert run_lowered(threading.get_ident, 1) == threading.get_ident()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert run_lowered(threading.get_ident, 1) == threading.get_ident()
