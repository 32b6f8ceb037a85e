"""Worker processes that cost a fork, in place of the seconds that importing torch takes.

A rank process forks a template as its first act, while it has one thread and no group. Asked over
a socket, the template forks twice, and the process in between ends at once: the kernel gives the
new process to the nearest ancestor that adopts orphans, which the rank does. So it is a child of
the rank, to be waited for, counted and killed as one that the rank has started. It then does what
a new interpreter would do with the same command line.

What it does not get from the rank as a real one would: limits, nice value, umask and signal mask
are those that the rank began with; what the fork server has imported is there already, and it is a
``multiprocessing`` child. Tests of any of that, and of the start itself, start real workers
(``RankPool.run``).
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from dcp_engine.executors.process import launch

__all__ = ["PRELOADED", "WorkerTemplate"]

PRELOADED = [
    "dcp_engine.executors.process.worker",
    "dcp_engine.async_saver.worker",
    "dcp_engine.checkpointer.process_child",
]
"""What workers import: to be imported before the template is forked."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LONGEST = 1 << 16
_LOOK_S = 0.0005


class WorkerTemplate:
    """Made by a process that has one thread; lives as long as that one."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._lock = threading.Lock()
        # Keeps messages apart, and says when the other end is gone.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        owner = os.getpid()
        if os.fork() == 0:
            try:
                self._socket.close()
                _serve(theirs.detach(), owner)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()

    def fork(self, args: Sequence[str], descriptor: int, environment: Mapping[str, str]) -> int:
        """The number of a new child of this process, which runs the ``-c`` of a command line.

        Raises:
            OSError: there is no such process to be had.
        """
        request = pickle.dumps((list(args), descriptor, dict(environment), os.getcwd()))
        with self._lock:
            # Standard output and error may have been put elsewhere since.
            socket.send_fds(self._socket, [request], [descriptor, 1, 2])
            answer = self._socket.recv(_LONGEST)
        if not answer:
            raise OSError("the template could not fork a worker")
        return int(answer)

    @contextmanager
    def in_place_of_starts(self) -> Iterator[None]:
        """Until this is left, all workers of this process are forked."""

        def start(args: Sequence[str], **options: Any) -> _Forked:
            return _Forked(self, args, **options)

        real = launch.subprocess
        launch.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": start})  # type: ignore[assignment]
        try:
            yield
        finally:
            launch.subprocess = real  # type: ignore[assignment]


class _Forked:
    """What the engine uses of ``Popen``. Options that it does not know are an error."""

    def __init__(
        self,
        template: WorkerTemplate,
        args: Sequence[str],
        *,
        stdin: int,
        pass_fds: Sequence[int],
        start_new_session: bool,
        env: Mapping[str, str],
    ) -> None:
        if stdin != subprocess.DEVNULL or not start_new_session:
            raise ValueError("a forked worker has a session of its own, and nothing to read")
        [descriptor] = pass_fds
        self.args = args
        self.returncode: int | None = None
        self._lock = threading.RLock()
        self.pid = template.fork(args, descriptor, env)

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
            time.sleep(_LOOK_S)
        return code

    def kill(self) -> None:
        with self._lock:
            if self.poll() is None:  # else its number may be somebody else's by now
                os.kill(self.pid, signal.SIGKILL)


# -- in the template ---------------------------------------------------------------------------


def _serve(requests: int, owner: int) -> NoReturn:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pool sees the death of a rank by the end of its pipe.
    _close_all_but(requests)
    # A worker collects garbage when it is up, which is not to go over all of torch.
    gc.freeze()
    channel = socket.socket(fileno=requests)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _LONGEST, 3)
        if not message:
            os._exit(0)
        channel.send(_fork_twice(message, descriptors))
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_twice(message: bytes, descriptors: list[int]) -> bytes:
    """The number of the new process, in digits; nothing if there is none."""
    read, write = os.pipe()
    try:
        between = os.fork()
        if between == 0:
            try:
                between = os.getpid()
                child = os.fork()
                if child == 0:
                    _work(message, descriptors, between)
                os.write(write, str(child).encode())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
    finally:
        os.close(write)
    os.waitpid(between, 0)  # now the new process has its parent
    answer = os.read(read, 100)
    os.close(read)
    return answer


def _work(message: bytes, descriptors: list[int], between: int) -> NoReturn:
    """The life of the new process."""
    try:
        while os.getppid() == between:
            time.sleep(_LOOK_S)
        args, descriptor, environment, directory = pickle.loads(message)
        os.setsid()
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        _arrange(descriptors, descriptor)
        at = args.index("-c")
        sys.argv[:] = [args[at], *args[at + 2 :]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        sys.modules.pop("__mp_main__", None)
        exec(compile(args[at + 1], "<string>", "exec"), main.__dict__)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _arrange(descriptors: list[int], number: int) -> None:
    """Standard streams, and ``number``; nothing else is open."""
    # Above all that they are to become, so that none is put in another's place.
    wanted, output, errors = (
        fcntl.fcntl(descriptor, fcntl.F_DUPFD, number + 3) for descriptor in descriptors
    )
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (errors, 2), (wanted, number)):
        os.dup2(source, target)
    _close_all_but(number)


def _close_all_but(number: int) -> None:
    """And standard input, output and error."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != number:
            with suppress(OSError):  # the one that the list was read from
                os.close(int(name))
