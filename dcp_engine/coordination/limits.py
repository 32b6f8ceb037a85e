"""How a wait for a key ends when nobody sets it.

Belongs here: ``WaitLimit`` and who sees to it. Does not belong here: what the key is given then.

A wait of a ``TCPStore`` that runs out writes C++ warnings to standard error, and for these looks
host names up (torch 2.13: two reverse lookups a wait, which take 5 s and more where the name server
does not answer). So the store's own limit is never reached on purpose: when the time is up, another
connection makes the key come. A new connection looks names up too, on both ends, so it is made some
time before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["BEYOND", "LOOK", "LimitKeeper", "WaitLimit"]

_Client = TypeVar("_Client")

BEYOND = 30.0
"""Seconds that the store itself waits longer than the limit."""
LOOK = 0.5
"""Seconds between two looks at a thread that talks to the store."""


class WaitLimit(Generic[_Client]):
    """Of one wait.

    Args:
        at: by the monotonic clock.
        end: makes the key come, over another connection, on another thread.
        lead: seconds before ``at`` from which on that connection is made.
    """

    def __init__(self, at: float, end: Callable[[_Client], object], lead: float = 0.0) -> None:
        self.at = at
        self.lead = lead
        self._end = end
        self._lock = threading.Lock()
        self._over = False
        self._begun = False
        self._done = threading.Event()

    def begin(self) -> bool:
        """Whether the wait is to be ended now, by ``run``; True once."""
        with self._lock:
            if self._over or self._begun or time.monotonic() < self.at:
                return False
            self._begun = True
            return True

    def run(self, connection: Callable[[], _Client]) -> None:
        """End the wait."""
        try:
            self._end(connection())
        finally:
            self._done.set()

    def leave(self) -> None:
        """The wait is over. Returns when whatever ``end`` says is said, if it has begun: what
        comes next may be the removal of all keys."""
        with self._lock:
            self._over = True
        if self._begun:
            self._done.wait(BEYOND)


class LimitKeeper(Generic[_Client]):
    """Ends waits whose time is up, for a thread that looks at it now and then.

    Args:
        connect: makes the other connection, once.
        drop: lets it go.
    """

    def __init__(
        self, connect: Callable[[], _Client], drop: Callable[[_Client], object] = lambda _: None
    ) -> None:
        self._connect = connect
        self._drop = drop
        self._client: Future[_Client] | None = None
        self.problem = ""
        """Why a wait could not be ended."""

    def look(self, limit: WaitLimit[_Client] | None) -> float:
        """End the wait if its time is up; return the seconds until the next look.

        Args:
            limit: of the wait that goes on now, if one does that has a limit.
        """
        if limit is None:
            return LOOK
        # Not on this thread: a store whose host is frozen takes no connection.
        left = limit.at - limit.lead - time.monotonic()
        if left <= 0:
            if self._client is None:
                self._client = Future()
                _start(self._make, self._client)
            if limit.begin():
                _start(self._end, limit, self._client)
            left = limit.at - time.monotonic()
        return min(left, LOOK) if left > 0 else LOOK

    def close(self) -> None:
        """Let the other connection go, if there is one."""
        if self._client is not None:
            self._client.add_done_callback(self._drop_made)

    def _make(self, client: Future[_Client]) -> None:
        try:
            client.set_result(self._connect())
        except Exception as error:  # whoever needs it will say so
            client.set_exception(error)

    def _end(self, limit: WaitLimit[_Client], client: Future[_Client]) -> None:
        try:
            limit.run(client.result)
        except Exception as error:  # whoever looks finds the wait overdue, and says why
            self.problem = f"{type(error).__name__}: {error}"

    def _drop_made(self, client: Future[_Client]) -> None:
        if client.exception() is None:
            self._drop(client.result())


def _start(run: Callable[..., None], *args: object) -> None:
    threading.Thread(target=run, args=args, name="dcp_engine-limit", daemon=True).start()
