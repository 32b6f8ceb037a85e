"""Numbers of operations.

Belongs here: handing them out, and refusing those that were never handed out.
"""

from __future__ import annotations

import threading

from dcp_engine.errors import UsageError

__all__ = ["Numbers"]


class Numbers:
    """The numbers of one session, from 0, to be called from any thread.

    Args:
        borrowed: the session stands for one of another process, which hands the numbers out.
    """

    def __init__(self, *, borrowed: bool = False) -> None:
        self._borrowed = borrowed
        self._lock = threading.Lock()
        self._next = 0

    def take(self) -> int:
        """The next number."""
        if self._borrowed:
            raise UsageError(
                "this session's numbers are taken in the process that opened it",
                hint="pass begin the number= that take_number returned there",
            )
        with self._lock:
            number, self._next = self._next, self._next + 1
        return number

    def given(self, number: int | None) -> int:
        """``number``, which ``take`` returned before; the next one where it is None."""
        if number is None:
            return self.take()
        if number < 0 or not (self._borrowed or number < self._next):
            raise UsageError(f"number {number} was not taken from this session")
        return number
