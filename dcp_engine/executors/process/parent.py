"""The side that owns a worker process.

Belongs here: ``WorkerProcess``: starting it, asking it, giving it up, ending it. Does not belong
here: the thread that looks after it (``supervisor``), and a new worker after one has died, which
is the owner's to decide.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Self

from dcp_engine.closing import Closing
from dcp_engine.errors import UsageError
from dcp_engine.executors.process.channel import LOOK_S, Channel, PeerGone
from dcp_engine.executors.process.failure import again, late, raised_by, stalled
from dcp_engine.executors.process.inboxes import Inbox
from dcp_engine.executors.process.launch import REAP_S
from dcp_engine.executors.process.protocol import (
    Failed,
    FromWorker,
    Request,
    Response,
    Terminate,
    encode,
)
from dcp_engine.executors.process.settings import WorkerSettings
from dcp_engine.executors.process.standstill import Standstill
from dcp_engine.executors.process.supervisor import Supervisor
from dcp_engine.executors.process.turns import Turns

__all__ = ["WorkerProcess"]

_STOPPED_S = 1.0
"""Seconds for which a worker may be stopped while it is to end and has nothing else to do."""


class _Late(Exception):
    """The deadline of a call. Not ``TimeoutError``: a handler may raise that itself."""


class _Stopped(Exception):
    """The process has been stopped for too long."""


class WorkerProcess(Closing):
    """One worker. Once its process has ended it stays dead: make a new one.

    Methods may be called from any thread. Not usable in a fork of the process that made it.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._turns = Turns()
        self._supervisor = Supervisor(settings)

    # -- life ----------------------------------------------------------------------------------

    @property
    def started(self) -> Future[int]:
        """The process id, once the handler is there to be asked; else why it is not: kind
        ``worker_start``, with the worker's traceback."""
        return self._supervisor.started

    @property
    def pid(self) -> int | None:
        """Of the process, from ``start`` on, and after its end too."""
        return self._supervisor.pid

    @property
    def alive(self) -> bool:
        """Whether there is a process: from ``start`` on until it ends, for whatever reason."""
        supervisor = self._supervisor
        return supervisor.thread is not None and not supervisor.ended.is_set()

    def start(self) -> None:
        """Start the process, and return without waiting for it; nothing if it was started.

        What goes wrong is in ``started``.

        Raises:
            UsageError: the worker is closed.
        """
        supervisor = self._supervisor
        with self._lock:
            self._refuse_if_closed()
            if supervisor.process is not None or supervisor.ended.is_set():
                return
            problem = supervisor.launch()
        if problem is not None:
            supervisor.not_started(problem)

    def close(self, timeout: float | None = None) -> None:
        """End the process: ask it to, wait, then kill it. Any number of times.

        A request in flight gets its answer, or ``worker_died``.

        Args:
            timeout: seconds until it is killed; by default the settings' ``shutdown_timeout``. A
                worker that has not come up is killed at once, and one that is stopped (SIGSTOP)
                and that nobody waits for an answer of, soon.
        """
        if os.getpid() != self._owner:
            return  # a fork: the worker is not its child
        limit = self.settings.shutdown_timeout if timeout is None else timeout
        end = time.monotonic() + limit
        supervisor = self._supervisor
        with self._lock:
            first, supervisor.closed = not supervisor.closed, True
            channel, thread = supervisor.channel, supervisor.thread
        if thread is None or channel is None:
            supervisor.not_started("it was closed before")
            return
        own = thread is threading.current_thread()
        if not supervisor.up or own or not self._ask_to_end(channel, first, end):
            supervisor.kill()
        if own:
            return  # it goes on to see the end
        if not self._ends_by(end):
            supervisor.kill()
            supervisor.ended.wait(REAP_S)
        thread.join(REAP_S)

    def _ends_by(self, deadline: float) -> bool:
        """Wait for the end. A process that is stopped does not come to it by itself."""
        supervisor, pid = self._supervisor, self.pid
        standstill = None if pid is None else Standstill(pid, _STOPPED_S)
        while not supervisor.ended.wait(min(LOOK_S, max(deadline - time.monotonic(), 0.0))):
            if time.monotonic() >= deadline:
                return False
            if standstill is not None and standstill.look() and not supervisor.inboxes.awaited:
                return False
        return True

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
        grace: float = 0.0,
        stall_timeout: float | None = None,
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
            grace: seconds beyond ``timeout`` for a worker that is not stopped.
            stall_timeout: seconds for which the process may be stopped (SIGSTOP). One that is
                stopped for longer, or at ``timeout``, is killed.

        Raises:
            WorkerError: kind ``worker_died``, naming process, exit status and request;
                ``worker_start``; ``timeout``; ``stalled``.
            UsageError: the worker was not started, or is closed.
            BaseException: what the handler raised, its traceback as a note; ``WorkerFailure``
                where it cannot be had as it was.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._turns.acquire(timeout):
            raise late(str(self), self.settings.rank, kind, timeout, "waiting for its turn")
        try:
            channel, pid = self._reachable()
            patience = _Patience(Standstill(pid, stall_timeout), deadline, grace)
            request_id, inbox = self._supervisor.inboxes.open()
            try:
                request = Request(id=request_id, kind=kind)
                self._send(channel, request, body, descriptors, patience)
                return self._answer(
                    inbox, patience, on_progress, f'request {request_id} ("{kind}")'
                )
            except _Late:
                if channel.torn:
                    self._supervisor.kill()  # it has half a message, and can take no other one
                raise late(str(self), self.settings.rank, kind, timeout, "no answer") from None
            except _Stopped:
                self._supervisor.kill()
                raise stalled(str(self), self.settings.rank, kind, patience.stopped_for) from None
            finally:
                self._supervisor.inboxes.close(request_id)
        finally:
            self._turns.release()

    def _reachable(self) -> tuple[Channel, int]:
        with self._lock:
            self._refuse_if_closed()
            supervisor = self._supervisor
            if supervisor.end is not None:
                raise again(supervisor.end)
            if supervisor.channel is None or supervisor.pid is None:
                raise UsageError(f"{self} was not started", hint="call start() first")
            return supervisor.channel, supervisor.pid

    def _send(
        self,
        channel: Channel,
        request: Request,
        body: bytes,
        descriptors: Sequence[int],
        patience: _Patience,
    ) -> None:
        if not self._supervisor.introduced.wait(patience.left):
            raise _Late
        try:
            channel.send(
                encode(request),
                body,
                descriptors,
                deadline=patience.deadline,
                meanwhile=patience.check,
            )
        except TimeoutError:
            raise _Late from None
        except PeerGone:
            # Its last words, an answer even, may be on their way; the end is.
            if not self._supervisor.ended.wait(REAP_S):
                self._supervisor.kill()

    def _answer(
        self,
        inbox: Inbox,
        patience: _Patience,
        on_progress: Callable[[bytes], None] | None,
        doing: str,
    ) -> bytes:
        while True:
            answer = _next(inbox, patience)
            if answer is None:
                raise again(self._supervisor.end, doing)
            message, data = answer
            if isinstance(message, Response):
                return data
            if isinstance(message, Failed):
                raise raised_by(message, data, str(self))
            if on_progress is not None:
                on_progress(data)

    # -- words ---------------------------------------------------------------------------------

    def __str__(self) -> str:
        return str(self._supervisor)

    def _refuse_if_closed(self) -> None:
        if os.getpid() != self._owner:
            raise UsageError(
                f"{self} belongs to process {self._owner}, which this one is a fork of"
            )
        if self._supervisor.closed:
            raise UsageError(f"{self} is closed")

    def __enter__(self) -> Self:
        self.start()
        return self


class _Patience:
    """How long one call waits.

    Args:
        deadline: for a process that is stopped.
        grace: seconds more for any other.
    """

    def __init__(self, standstill: Standstill, deadline: float | None, grace: float) -> None:
        self._standstill = standstill
        self._stopped_deadline = deadline
        self.deadline = None if deadline is None else deadline + grace

    @property
    def left(self) -> float | None:
        """Seconds, at most."""
        return _left(self.deadline)

    @property
    def until_check(self) -> float:
        """Seconds."""
        left = self.left
        return LOOK_S if left is None else min(LOOK_S, left)

    @property
    def stopped_for(self) -> float:
        """Seconds for which the process has been stopped."""
        return self._standstill.seconds

    def check(self) -> None:
        """Raise if it is over. Called every ``LOOK_S`` while nothing comes."""
        if self._standstill.look():
            raise _Stopped
        if self.left == 0 or (self._standstill.stopped and _left(self._stopped_deadline) == 0):
            raise _Late


def _next(inbox: Inbox, patience: _Patience) -> tuple[FromWorker, bytes] | None:
    while True:
        try:
            return inbox.get(timeout=patience.until_check)
        except queue.Empty:
            patience.check()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)
