"""The thread that looks after a worker process.

Belongs here: making the process, its first message, receiving everything it says, and its end.
Does not belong here: asking it, and when it has to end (``parent``); how a process is made
(``launch``).

The thread is a daemon and nothing is registered to run at exit: a worker ends with its parent by
itself, and never keeps it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import Any

from dcp_engine.executors.process.channel import Channel, PeerGone
from dcp_engine.executors.process.failure import WorkerError
from dcp_engine.executors.process.inboxes import Inboxes
from dcp_engine.executors.process.launch import launch, reap, search_path
from dcp_engine.executors.process.manners import process_descriptor
from dcp_engine.executors.process.pickles import main_module
from dcp_engine.executors.process.protocol import (
    Failed,
    Progress,
    Ready,
    Response,
    Start,
    StartFailed,
    decode_from_worker,
    encode,
)
from dcp_engine.executors.process.settings import WorkerSettings

__all__ = ["Supervisor"]


class Supervisor:
    """Of one process, which is made once (``launch``). Flags and futures may be read from any
    thread."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.started: Future[int] = Future()
        """The process id, once the handler is there to be asked; else why it is not."""
        self.introduced = threading.Event()
        """The first message was sent; requests may follow."""
        self.up = False
        """The handler is there."""
        self.ended = threading.Event()
        self.end: WorkerError | None = None
        """How it ended, or why it did not start."""
        self.closed = False
        """Its end is wanted; set by the owner."""
        self.inboxes = Inboxes()
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.thread: threading.Thread | None = None
        self._settings = settings
        self._lock = threading.Lock()

    def launch(self) -> str | None:
        """Make the process and the thread that looks after it; return what was wrong."""
        try:
            parent_end, child_end = socket.socketpair()
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        try:
            process = self.process = launch(self._settings, child_end)
        except OSError as error:
            parent_end.close()
            return f"{type(error).__name__}: {error}"
        finally:
            child_end.close()
        descriptor = process_descriptor(process.pid)
        channel = Channel(parent_end, descriptor)
        thread = threading.Thread(
            target=self._supervise,
            args=(process, channel, descriptor),
            name=f"dcp_engine-{self._settings.name}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:  # the interpreter ends, and has no thread left to give
            process.kill()
            process.wait()
            _close(channel, descriptor)
            return f"{type(error).__name__}: {error}"
        self.channel, self.thread = channel, thread
        return None

    def kill(self) -> None:
        """Send SIGKILL, if there is a process. It ends stopped ones too."""
        if self.process is not None:
            self.process.kill()

    def not_started(self, why: str) -> None:
        """There is no process, and will be none."""
        self._finish(self._start_error(why))

    # -- the thread ----------------------------------------------------------------------------

    def _supervise(
        self, process: subprocess.Popen[bytes], channel: Channel, descriptor: int | None
    ) -> None:
        problem = ""
        deadline = time.monotonic() + self._settings.start_timeout
        try:
            problem = self._introduce(channel, deadline) or self._receive(channel, deadline)
        except Exception as error:  # a message that cannot be read: nothing more can be
            problem = f"{type(error).__name__}: {error}"
            process.kill()
        status = reap(process)
        if self.up:
            end = WorkerError(
                f"{self} {status}", rank=self._settings.rank, hint="look at what it printed last"
            )
            if problem:
                end.add_note(problem)
        else:
            closed = "it was closed before it was up" if self.closed else ""
            end = self._start_error(problem or closed or f"it {status}")
        self._finish(end)
        _close(channel, descriptor)

    def _introduce(self, channel: Channel, deadline: float) -> str:
        """Send what the worker needs to come up; return what was wrong."""
        settings = self._settings
        start = Start(
            handler=settings.handler,
            name=settings.name,
            rank=settings.rank,
            parent_pid=os.getpid(),
            nice=settings.nice,
            idle_io=settings.idle_io,
            argv=list(sys.argv),
            main=main_module(),
        )
        try:
            channel.send(search_path(), deadline=deadline)
            channel.send(encode(start), settings.init, deadline=deadline)
        except PeerGone:
            return ""  # it may have said why
        except TimeoutError:
            self.kill()
            return f"it was not up after {settings.start_timeout:.3g} s"
        finally:
            self.introduced.set()
        return ""

    def _receive(self, channel: Channel, start_deadline: float) -> str:
        """Hand out what the worker says, until it is gone; return why it did not come up."""
        while True:
            try:
                frame = channel.receive(None if self.up else start_deadline)
            except TimeoutError:
                self.kill()
                return f"it was not up after {self._settings.start_timeout:.3g} s"
            if frame is None:
                return ""
            message = decode_from_worker(frame.message)
            if isinstance(message, StartFailed):
                return "its traceback:\n" + frame.body.decode("utf-8", "replace").rstrip()
            if isinstance(message, Ready):
                self.up = True
                _settle(self.started, self.pid)
            elif isinstance(message, Progress | Response | Failed):
                self.inboxes.deliver(message.id, message, frame.body)

    def _finish(self, end: WorkerError) -> None:
        with self._lock:
            self.end = self.end or end
        self.ended.set()
        self.introduced.set()
        self.inboxes.end()
        _settle(self.started, end)

    # -- words ---------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Of the process, once it is made, and after its end too."""
        return None if self.process is None else self.process.pid

    def __str__(self) -> str:
        pid = f" (pid {self.pid})" if self.pid is not None else ""
        return f'the worker process "{self._settings.name}"{pid}'

    def _start_error(self, why: str) -> WorkerError:
        return WorkerError(
            f"{self} did not start: {why}", kind="worker_start", rank=self._settings.rank
        )


def _settle(future: Future[int], outcome: Any) -> None:
    """Set the future, unless it is set, or was cancelled by whoever has it."""
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        return


def _close(channel: Channel, descriptor: int | None) -> None:
    channel.close()
    if descriptor is not None:
        os.close(descriptor)
