"""The thread of an operation that talks to the store.

Belongs here: running a role's turns and the calling thread's requests one after the other, so that
a client is used by one thread only, heartbeats go on while the calling thread works, and a call
that never returns does not take the calling thread with it. Does not belong here: what a turn does
(``role``).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from dcp_engine.coordination.limits import LOOK, LimitKeeper
from dcp_engine.coordination.role import Role
from dcp_engine.coordination.store_client import StoreClient, WaitTimeout
from dcp_engine.errors import CoordinationError

__all__ = ["StoreThread"]

_Result = TypeVar("_Result")
_RoleT = TypeVar("_RoleT", bound=Role)


class _Request:
    """A call to be made on the store thread."""

    def __init__(self, run: Callable[[], None], refuse: Callable[[BaseException], None]) -> None:
        self.run = run
        self.refuse = refuse


class StoreThread(Generic[_RoleT]):
    """Started when it is made.

    Args:
        connect: makes the client; called on the new thread.
        assume: makes the role of the operation, given the client; likewise.
        another: makes another client, of another connection; called on another thread.
        drop: takes that one back.
        connect_limit: seconds after which ``connect`` counts as stuck.
        slack: seconds by which a call may exceed its own limit before it counts as stuck.
    """

    def __init__(
        self,
        connect: Callable[[], StoreClient],
        assume: Callable[[StoreClient], _RoleT],
        another: Callable[[], StoreClient],
        drop: Callable[[StoreClient], None],
        *,
        name: str,
        slack: float,
        connect_limit: float,
    ) -> None:
        # No SimpleQueue: its get waits for ever if the time is up before it begins to wait (3.11).
        self._requests: queue.Queue[_Request | None] = queue.Queue()
        self._slack = slack
        self._connect_limit = connect_limit
        self._started = time.monotonic()
        self._ready: Future[_RoleT] = Future()
        self._broken: BaseException | None = None
        self._ended = threading.Event()
        self._limits = LimitKeeper(another, drop)
        self._refuse = threading.Lock()
        self.client: StoreClient | None = None
        self._thread = threading.Thread(
            target=self._run, args=(connect, assume), name=name, daemon=True
        )
        self._thread.start()

    # -- calling thread ------------------------------------------------------------------------

    def ask(self, call: Callable[[_RoleT], _Result]) -> _Result:
        """Run ``call`` on the store thread and return what it returns."""
        done: Future[_Result] = Future()

        def run() -> None:
            done.set_result(call(self._ready.result()))

        self._submit(_Request(run, done.set_exception))
        return self.result(done)

    def tell(self, call: Callable[[_RoleT], None], refuse: Callable[[BaseException], None]) -> None:
        """Run ``call`` on the store thread; ``refuse`` gets the error if that fails."""
        self._submit(_Request(lambda: call(self._ready.result()), refuse))

    def result(self, future: Future[_Result], limit: float | None = None) -> _Result:
        """Wait for a future that the store thread sets, unless the thread is stuck.

        Raises:
            CoordinationError: kind ``store_lost``.
            TimeoutError: not within ``limit`` seconds.
        """
        deadline = None if limit is None else time.monotonic() + limit
        pause = LOOK
        while True:
            if deadline is not None:
                pause = min(pause, max(deadline - time.monotonic(), 0.0))
            if wait([future], timeout=pause).done:
                return future.result()
            self.raise_if_stuck()
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError
            pause = self._limits.look(None if self.client is None else self.client.limit)

    def raise_if_stuck(self) -> None:
        """Raise ``store_lost`` if the store has not answered for too long."""
        client = self.client
        if client is None:
            if time.monotonic() > self._started + self._connect_limit and not self._ended.is_set():
                raise CoordinationError(
                    f"no connection to the store within {self._connect_limit:.3g} s",
                    kind="store_lost",
                )
            return
        if client.overdue(self._slack):
            why = f" ({self._limits.problem})" if self._limits.problem else ""
            client.lose(f"no answer within {self._slack:.3g} s of the limit of a call{why}")
        if client.lost is not None:
            raise client.lost

    @property
    def role(self) -> _RoleT | None:
        """The role, once the thread has connected; only its flags may be read."""
        if self._ready.done() and self._ready.exception() is None:
            return self._ready.result()
        return None

    def stop(self, limit: float) -> bool:
        """End the thread after what was asked before; return whether it ended in time, which it
        does not while a call to the store does not return."""
        self._requests.put(None)
        self._limits.close()
        if not self._ended.wait(limit):
            return False
        # A thread that still unwinds when the interpreter goes would release its connection then,
        # which aborts the process.
        self._thread.join(limit)
        return True

    def _submit(self, request: _Request) -> None:
        with self._refuse:
            if self._broken is None:
                self._requests.put(request)
                return
        request.refuse(self._broken)

    # -- store thread --------------------------------------------------------------------------

    def _run(
        self, connect: Callable[[], StoreClient], assume: Callable[[StoreClient], _RoleT]
    ) -> None:
        try:
            self.client = connect()
            role = assume(self.client)
            self._ready.set_result(role)
        except BaseException as error:
            self._ready.set_exception(error)
            self._break(error)
            return
        try:
            while self._turn(role):
                pass
        except BaseException as error:
            told = self._told(error)
            role.break_off(told)
            self._break(told)
        self._ended.set()

    def _turn(self, role: _RoleT) -> bool:
        delay = role.turn()
        try:
            request = self._requests.get(timeout=delay) if delay > 0 else self._requests.get(False)
        except queue.Empty:
            return True
        if request is None:
            return False
        try:
            request.run()
        except BaseException as error:
            request.refuse(self._told(error))
        return True

    def _told(self, error: BaseException) -> BaseException:
        """The error as the calling thread gets it."""
        if isinstance(error, WaitTimeout) and self.client is not None:
            return self.client.lose(f"a key that must be there is not ({error})")
        return error

    def _break(self, error: BaseException) -> None:
        with self._refuse:
            self._broken = error
        while True:
            try:
                request = self._requests.get(False)
            except queue.Empty:
                break
            if request is not None:
                request.refuse(error)
        self._ended.set()
