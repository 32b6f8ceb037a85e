"""A lock that is given in the order in which it was asked for.

Belongs here: nothing but that. ``threading.Lock`` promises no order.
"""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["Turns"]


class Turns:
    """First come, first served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait for one's turn; whether it came within ``timeout`` seconds."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return True
            mine = threading.Event()
            self._waiting.append(mine)
        try:
            if mine.wait(timeout):
                return True
        except BaseException:
            self._leave(mine)
            raise
        return not self._leave(mine, keep=True)

    def release(self) -> None:
        """Let the next one have its turn."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False

    def _leave(self, mine: threading.Event, *, keep: bool = False) -> bool:
        """Stop waiting; False if the turn had come meanwhile (and is kept, or handed on)."""
        with self._lock:
            if not mine.is_set():
                self._waiting.remove(mine)
                return True
        if not keep:
            self.release()
        return False
