"""The side that owns a worker process.

Belongs here: ``WorkerProcess``: starting it, asking it, noticing its end, ending it. Does not
belong here: how the process is made (``launch``), and a new worker after one has died, which is
the owner's to decide.

One thread beside the callers sends the first message, receives everything, and waits for the
process. It is a daemon and nothing is registered to run at exit: a worker ends with its parent by
itself, and never keeps it.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Any

from dcp_engine.errors import UsageError
from dcp_engine.executors.process.channel import Channel, PeerGone
from dcp_engine.executors.process.failure import WorkerError, again, late, raised_by
from dcp_engine.executors.process.inboxes import Inbox, Inboxes
from dcp_engine.executors.process.launch import REAP_S, launch, reap, search_path
from dcp_engine.executors.process.manners import process_descriptor
from dcp_engine.executors.process.pickles import main_module
from dcp_engine.executors.process.protocol import (
    Failed,
    FromWorker,
    Progress,
    Ready,
    Request,
    Response,
    Start,
    StartFailed,
    Terminate,
    decode_from_worker,
    encode,
)
from dcp_engine.executors.process.settings import WorkerSettings
from dcp_engine.executors.process.turns import Turns

__all__ = ["WorkerProcess"]


class _Late(Exception):
    """The deadline of a call. Not ``TimeoutError``: a handler may raise that itself."""


class WorkerProcess:
    """One worker. Once its process has ended it stays dead: make a new one.

    Methods may be called from any thread. Not usable in a fork of the process that made it.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.started: Future[int] = Future()
        """The process id, once the handler is there to be asked; else why it is not: kind
        ``worker_start``, with the worker's traceback."""
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._turns = Turns()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._thread: threading.Thread | None = None
        self._inboxes = Inboxes()
        self._introduced = threading.Event()
        """The first message was sent; requests may follow."""
        self._up = False
        self._ended = threading.Event()
        self._end: WorkerError | None = None
        self._closed = False

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process, and return without waiting for it; nothing if it was started.

        What goes wrong is in ``started``.

        Raises:
            UsageError: the worker is closed.
        """
        with self._lock:
            self._refuse_if_closed()
            if self._process is not None or self._ended.is_set():
                return
            problem = self._launch()
        if problem is not None:
            self._finish(self._not_started(problem))

    def _launch(self) -> str | None:
        """Make the process and the thread that looks after it; return what was wrong."""
        parent_end, child_end = socket.socketpair()
        try:
            process = self._process = launch(self.settings, child_end)
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
            name=f"dcp_engine-{self.settings.name}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:  # the interpreter ends, and has no thread left to give
            process.kill()
            process.wait()
            _close(channel, descriptor)
            return f"{type(error).__name__}: {error}"
        self._channel, self._thread = channel, thread
        return None

    @property
    def pid(self) -> int | None:
        """Of the process, from ``start`` on, and after its end too."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether there is a process: from ``start`` on until it ends, for whatever reason."""
        return self._thread is not None and not self._ended.is_set()

    def close(self, timeout: float | None = None) -> None:
        """End the process: ask it to, wait, then kill it. Any number of times.

        A request in flight gets its answer, or ``worker_died``.

        Args:
            timeout: seconds until it is killed; by default the settings' ``shutdown_timeout``. A
                worker that has not come up is killed at once.
        """
        if os.getpid() != self._owner:
            return  # a fork: the worker is not its child
        limit = self.settings.shutdown_timeout if timeout is None else timeout
        end = time.monotonic() + limit
        with self._lock:
            first, self._closed = not self._closed, True
            process, channel, thread = self._process, self._channel, self._thread
        if thread is None or channel is None or process is None:
            self._finish(self._not_started("it was closed before"))
            return
        own = thread is threading.current_thread()
        if not self._up or own or not self._ask_to_end(channel, first, end):
            process.kill()
        if own:
            return  # it goes on to see the end
        if not self._ended.wait(max(end - time.monotonic(), 0.0)):
            process.kill()
            self._ended.wait(REAP_S)
        thread.join(REAP_S)

    def _ask_to_end(self, channel: Channel, first: bool, end: float) -> bool:
        if not first:
            return True
        try:
            channel.send(encode(Terminate()), deadline=end)
        except (PeerGone, TimeoutError):
            return False
        return True

    # -- asking --------------------------------------------------------------------------------

    def call(
        self,
        kind: str,
        body: bytes = b"",
        *,
        descriptors: Sequence[int] = (),
        on_progress: Callable[[bytes], None] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Ask the worker, and wait for its answer. Callers have their turn in order.

        A worker that is still starting gets the request when it is up.

        Args:
            descriptors: file descriptors that go with the request. The worker gets copies of its
                own; the caller keeps these.
            on_progress: called on this thread with what the handler says meanwhile. If it raises,
                the call ends by that, and the answer is dropped.
            timeout: seconds, the wait for one's turn included. The worker goes on with a request
                that nobody waits for any more, and takes the next one after it.

        Raises:
            WorkerError: kind ``worker_died``, naming process, exit status and request;
                ``worker_start``; ``timeout``.
            UsageError: the worker was not started, or is closed.
            BaseException: what the handler raised, its traceback as a note; ``WorkerFailure``
                where it cannot be had as it was.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._turns.acquire(timeout):
            raise late(str(self), self.settings.rank, kind, timeout, "waiting for its turn")
        try:
            return self._call(kind, body, descriptors, on_progress, deadline, timeout)
        finally:
            self._turns.release()

    def _call(
        self,
        kind: str,
        body: bytes,
        descriptors: Sequence[int],
        on_progress: Callable[[bytes], None] | None,
        deadline: float | None,
        timeout: float | None,
    ) -> bytes:
        with self._lock:
            self._refuse_if_closed()
            if self._end is not None:
                raise again(self._end)
            if self._channel is None:
                raise UsageError(f"{self} was not started", hint="call start() first")
            channel = self._channel
        request_id, inbox = self._inboxes.open()
        doing = f'request {request_id} ("{kind}")'
        try:
            self._send(channel, Request(id=request_id, kind=kind), body, descriptors, deadline)
            while True:
                answer = _next(inbox, deadline)
                if answer is None:
                    raise again(self._end, doing)
                message, data = answer
                if isinstance(message, Response):
                    return data
                if isinstance(message, Failed):
                    raise raised_by(message, data, str(self))
                if on_progress is not None:
                    on_progress(data)
        except _Late:
            if channel.torn:
                self._kill()  # it has half a message, and can take no other one
            raise late(str(self), self.settings.rank, kind, timeout, "no answer") from None
        finally:
            self._inboxes.close(request_id)

    def _send(
        self,
        channel: Channel,
        request: Request,
        body: bytes,
        descriptors: Sequence[int],
        deadline: float | None,
    ) -> None:
        if not self._introduced.wait(_left(deadline)):
            raise _Late
        try:
            channel.send(encode(request), body, descriptors, deadline=deadline)
        except TimeoutError:
            raise _Late from None
        except PeerGone:
            # Its last words, an answer even, may be on their way; the end is.
            if not self._ended.wait(REAP_S):
                self._kill()

    # -- the other thread ----------------------------------------------------------------------

    def _supervise(
        self, process: subprocess.Popen[bytes], channel: Channel, descriptor: int | None
    ) -> None:
        problem = ""
        deadline = time.monotonic() + self.settings.start_timeout
        try:
            problem = self._introduce(channel, deadline) or self._receive(channel, deadline)
        except Exception as error:  # a message that cannot be read: nothing more can be
            problem = f"{type(error).__name__}: {error}"
            process.kill()
        status = reap(process)
        if self._up:
            end = WorkerError(
                f"{self} {status}", rank=self.settings.rank, hint="look at what it printed last"
            )
            if problem:
                end.add_note(problem)
        else:
            closed = "it was closed before it was up" if self._closed else ""
            end = self._not_started(problem or closed or f"it {status}")
        self._finish(end)
        _close(channel, descriptor)

    def _introduce(self, channel: Channel, deadline: float) -> str:
        """Send what the worker needs to come up; return what was wrong."""
        settings = self.settings
        start = Start(
            handler=settings.handler,
            name=settings.name,
            rank=settings.rank,
            parent_pid=self._owner,
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
            self._kill()
            return f"it was not up after {settings.start_timeout:.3g} s"
        finally:
            self._introduced.set()
        return ""

    def _receive(self, channel: Channel, start_deadline: float) -> str:
        """Hand out what the worker says, until it is gone; return why it did not come up."""
        while True:
            try:
                frame = channel.receive(None if self._up else start_deadline)
            except TimeoutError:
                self._kill()
                return f"it was not up after {self.settings.start_timeout:.3g} s"
            if frame is None:
                return ""
            message = decode_from_worker(frame.message)
            if isinstance(message, StartFailed):
                return "its traceback:\n" + frame.body.decode("utf-8", "replace").rstrip()
            if isinstance(message, Ready):
                self._up = True
                _settle(self.started, self.pid)
            elif isinstance(message, Progress | Response | Failed):
                self._inboxes.deliver(message.id, message, frame.body)

    def _finish(self, end: WorkerError) -> None:
        with self._lock:
            self._end = self._end or end
        self._ended.set()
        self._introduced.set()
        self._inboxes.end()
        _settle(self.started, end)

    # -- words ---------------------------------------------------------------------------------

    def __str__(self) -> str:
        pid = f" (pid {self.pid})" if self.pid is not None else ""
        return f'the worker process "{self.settings.name}"{pid}'

    def _not_started(self, why: str) -> WorkerError:
        return WorkerError(
            f"{self} did not start: {why}", kind="worker_start", rank=self.settings.rank
        )

    def _refuse_if_closed(self) -> None:
        if os.getpid() != self._owner:
            raise UsageError(
                f"{self} belongs to process {self._owner}, which this one is a fork of"
            )
        if self._closed:
            raise UsageError(f"{self} is closed")

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def __enter__(self) -> WorkerProcess:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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


def _next(inbox: Inbox, deadline: float | None) -> tuple[FromWorker, bytes] | None:
    try:
        return inbox.get(timeout=_left(deadline))
    except queue.Empty:
        raise _Late from None


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)
