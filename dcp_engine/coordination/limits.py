"""How a wait for a key ends when nobody sets it.

Belongs here: ``WaitLimit`` and who sees to it. Does not belong here: what the key is given then.

A wait of a ``TCPStore`` that runs out writes C++ warnings to standard error, and for these looks
host names up (torch 2.13: two reverse lookups a wait, which take 5 s and more where the name server
does not answer). So the store's own limit is never reached on purpose: when the time is up, another
connection makes the key come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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
    """

    def __init__(self, at: float, end: Callable[[_Client], object]) -> None:
        self.at = at
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

    def run(self, apart: Callable[[Callable[[_Client], object]], object]) -> None:
        """End the wait."""
        try:
            apart(self._end)
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
        apart: calls what it is given with a connection of its own.
    """

    def __init__(self, apart: Callable[[Callable[[_Client], object]], object]) -> None:
        self._apart = apart
        self.problem = ""
        """Why a wait could not be ended."""

    def look(self, limit: WaitLimit[_Client] | None) -> float:
        """End the wait if its time is up; return the seconds until the next look.

        Args:
            limit: of the wait that goes on now, if one does that has a limit.
        """
        if limit is None:
            return LOOK
        if limit.begin():
            # Not on this thread: a store whose host is frozen takes no connection.
            threading.Thread(
                target=self._end, args=(limit,), name="dcp_engine-limit", daemon=True
            ).start()
        left = limit.at - time.monotonic()
        return min(left, LOOK) if left > 0 else LOOK

    def _end(self, limit: WaitLimit[_Client]) -> None:
        try:
            limit.run(self._apart)
        except Exception as error:  # whoever looks finds the wait overdue, and says why
            self.problem = f"{type(error).__name__}: {error}"
