"""Handlers that run in the workers of the tests. No torch here."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dcp_engine.errors import CheckpointException, StorageError
from dcp_engine.executors.process.handler import WorkerContext, WorkerRequest
from dcp_engine.executors.process.main_module import loads


class TwoArguments(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


class HoldsALock(ValueError):
    """Cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Quits(BaseException):
    """No Exception."""


class Mute(Exception):
    """Cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    def __reduce__(self) -> Any:
        raise RuntimeError("no parts")


def failure(name: str) -> BaseException:
    if name == "ranks":
        first = HoldsALock("the disk of rank 1")
        return CheckpointException("save failed", {1: (first, _no_stack())}, kind="io_error")
    errors: dict[str, BaseException] = {
        "plain": KeyError("k"),
        "late": TimeoutError("of the handler's own"),
        "lock": HoldsALock("held"),
        "two arguments": TwoArguments("a", "b"),
        "exit": SystemExit(7),
        "interrupt": KeyboardInterrupt(),
        "base": Quits("out"),
        "storage": StorageError("no space", kind="disk_full", file="f", hint="make room"),
        "local": type("Local", (Exception,), {})("here only"),
        "surrogate": ValueError("\udc80"),
        "mute": Mute(),
        "large": ValueError(bytes(2 << 20)),
    }
    return errors[name]


def _no_stack() -> Any:
    import traceback

    return traceback.StackSummary.from_list([])


def _autogroup() -> str | None:
    enabled = Path("/proc/sys/kernel/sched_autogroup_enabled")
    if not enabled.exists() or enabled.read_text().strip() != "1":
        return None
    return Path("/proc/self/autogroup").read_text()


def _io_priority() -> int | None:
    number = {"x86_64": 252, "aarch64": 31}.get(platform.machine())
    return None if number is None else ctypes.CDLL(None).syscall(ctypes.c_long(number), 1, 0)


class Tools:
    """Does what the kind of the request says."""

    def __init__(self, init: bytes, context: WorkerContext) -> None:
        self.init = init
        self.context = context

    def handle(self, request: WorkerRequest) -> bytes:
        return getattr(self, request.kind)(request)

    def echo(self, request: WorkerRequest) -> bytes:
        return request.body

    def about(self, request: WorkerRequest) -> bytes:
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        about = {
            "pid": os.getpid(),
            "parent": self.context.parent_pid,
            "name": self.context.name,
            "rank": self.context.rank,
            "init": self.init.decode(),
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
            "io": _io_priority(),
            "autogroup": _autogroup(),
            "session": os.getsid(0),
            "comm": Path("/proc/self/comm").read_text().strip(),
            "cuda": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "omp": os.environ.get("OMP_NUM_THREADS"),
            "extra": os.environ.get("EXTRA"),
            "path": sys.path,
            "argv": sys.argv,
            "cwd": os.getcwd(),
            "gc": gc.isenabled(),
            "frozen": gc.get_freeze_count() > 0,
            "main": type(sys.modules["__main__"]).__name__,
            "thread": threading.current_thread() is threading.main_thread(),
            "ignored": int(status["SigIgn"], 16),
        }
        return json.dumps(about).encode()

    def fail(self, request: WorkerRequest) -> bytes:
        raise failure(request.body.decode())

    def wrong_type(self, request: WorkerRequest) -> bytes:
        return None  # type: ignore[return-value]

    def unpickle(self, request: WorkerRequest) -> bytes:
        return repr(loads(request.body)).encode()

    def use_main(self, request: WorkerRequest) -> bytes:
        function, argument = loads(request.body)
        result: bytes = function(argument)
        return result

    def read(self, request: WorkerRequest) -> bytes:
        parts = []
        for descriptor in request.descriptors:
            parts.append(os.pread(descriptor, 100, 0))
            os.close(descriptor)
        return b"|".join(parts)

    def write(self, request: WorkerRequest) -> bytes:
        (descriptor,) = request.descriptors
        os.pwrite(descriptor, request.body, 0)
        os.close(descriptor)
        return b""

    def count(self, request: WorkerRequest) -> bytes:
        for number in range(int(request.body)):
            request.progress(str(number).encode())
        return b"done"

    def descriptors(self, request: WorkerRequest) -> bytes:
        return str(len(os.listdir("/proc/self/fd"))).encode()

    def memory(self, request: WorkerRequest) -> bytes:
        return str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).encode()

    def die(self, request: WorkerRequest) -> bytes:
        if request.body == b"exit":
            os._exit(9)
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    def say_and_wait(self, request: WorkerRequest) -> bytes:
        """Until the file named in the body is gone."""
        request.progress(b"here")
        while Path(request.body.decode()).exists():
            time.sleep(0.01)
        return b"gone"

    def stay(self, request: WorkerRequest) -> bytes:
        request.progress(b"here")
        time.sleep(600)
        return b""

    def close(self) -> None:
        if self.init.startswith(b"/"):
            Path(self.init.decode()).write_text("closed")


def tools(init: bytes, context: WorkerContext) -> Tools:
    return Tools(init, context)


def broken(init: bytes, context: WorkerContext) -> Tools:
    raise LookupError("nothing to work with: " + init.decode())


def slow(init: bytes, context: WorkerContext) -> Tools:
    time.sleep(600)
    raise AssertionError
