"""Processes by the dozen: a server that has torch imported and forks a child for each request.

A process that imports torch takes seconds to start; a fork of one that did takes milliseconds. The
server is a process of its own because the one that runs the tests has threads, and must not fork.

Belongs here: starting, watching and ending children. Does not belong here: what they do
(``jobs``).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

__all__ = ["Child", "ForkServer", "Words"]

_PR_SET_PDEATHSIG = 1
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_CPP_LOG_LEVEL": "FATAL",  # it logs each connection that a kill cut
}
START_LIMIT = 120.0


class Words:
    """A named pipe through which children say what they come to, one line a message."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        # For writing too, so that it does not end when the first child does.
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._rest = b""
        self.heard: list[list[Any]] = []

    def listen(
        self, until: Callable[[], bool], timeout: float, *, children: Sequence[Child] = ()
    ) -> bool:
        """Read until ``until`` holds (True), or the time is over (False). Wakes at each message
        and at the end of each of ``children``."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        for child in children:
            poll.register(child.handle, select.POLLIN)
        while True:
            self._read()
            if until():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for descriptor, _ in poll.poll(left * 1000):
                if descriptor != self._descriptor:
                    poll.unregister(descriptor)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._descriptor, 65536):
                self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        self.heard += [json.loads(line) for line in lines]

    def close(self) -> None:
        os.close(self._descriptor)
        self.path.unlink()


class Child(NamedTuple):
    """A process. ``handle`` is a descriptor that becomes readable when it has ended."""

    pid: int
    handle: int
    log: Path

    @property
    def ended(self) -> bool:
        return bool(select.select([self.handle], [], [], 0)[0])

    def kill(self) -> None:
        """SIGKILL, whether it still runs or not."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def stacks(self) -> str:
        """Where it is, if it still runs; and all that it wrote."""
        if not self.ended:
            signal.pidfd_send_signal(self.handle, signal.SIGUSR1)
            deadline = time.monotonic() + 2.0
            while time.monotonic() < deadline and "most recent call" not in self._output():
                select.select([self.handle], [], [], 0.05)
        return self._output()[-6000:]

    def _output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def close(self) -> None:
        self.kill()
        os.close(self.handle)


class ForkServer:
    """The server, as the tests see it. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **_ENVIRONMENT},
        )
        if self._answer(START_LIMIT) != "ready":
            raise RuntimeError("the fork server did not start")

    def _answer(self, timeout: float) -> Any:
        output = self._process.stdout
        assert output is not None
        if not select.select([output], [], [], timeout)[0]:
            raise TimeoutError("the fork server does not answer")
        return json.loads(output.readline())

    def start(self, function: Callable[..., object], words: Words, *args: Any) -> Child:
        """Call ``function(say, *args)`` in a child; ``say(*message)`` goes to ``words``, and so
        does an error that it raises: ``["raised", traceback]``. All are JSON values."""
        self._count += 1
        log = self._directory / f"child-{self._count}.log"
        request = [function.__module__, function.__qualname__, str(words.path), str(log), args]
        pipe = self._process.stdin
        assert pipe is not None
        pipe.write(json.dumps(request).encode() + b"\n")
        pipe.flush()
        pid = self._answer(10.0)
        return Child(pid, os.pidfd_open(pid), log)

    def close(self) -> None:
        """End the server, and with it all children."""
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _serve() -> None:
    import torch.distributed.tensor

    import dcp_engine

    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dcp_engine.save  # noqa: B018 - imported now, not once per child
    torch.set_num_threads(1)
    print(json.dumps("ready"), flush=True)
    running: set[int] = set()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _live(json.loads(line))
        running.add(pid)
        print(json.dumps(pid), flush=True)
        running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _live(request: list[Any]) -> None:
    """The life of a child; does not return."""
    module, name, fifo, log, args = request
    status = 1
    try:
        _end_with_parent()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        # Open from the begin: what is said when descriptors are exhausted must be heard.
        pipe = os.open(fifo, os.O_WRONLY)

        def say(*message: Any) -> None:
            os.write(pipe, json.dumps(message).encode() + b"\n")

        try:
            getattr(importlib.import_module(module), name)(say, *args)
            status = 0
        except BaseException:
            say("raised", traceback.format_exc()[-3000:])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
