"""Noticing that a process is stopped (SIGSTOP, SIGTSTP): it answers nothing, and has not ended.

Belongs here: looking, and adding up for how long. Does not belong here: what is done about it.

What the operating system says is certain, where a missing heartbeat may mean no more than a busy
processor or a long call that holds the interpreter lock. A process that a debugger holds is none
of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Standstill", "is_stopped"]

_LONGEST_S = 2.0
"""Between two looks, for the time between them to count."""


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped now; False where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    # The name before it may hold anything, closing parentheses too.
    return text.rpartition(")")[2].split()[:1] == ["T"]


class Standstill:
    """For how long a process has been stopped without a break.

    To be looked at once a second or so. Time in which nobody did does not count: this process may
    have been stopped, too.

    Args:
        limit: seconds after which that is too long; None: never.
    """

    def __init__(
        self, pid: int, limit: float | None, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._pid = pid
        self._limit = limit
        self._now = now
        self.seconds = 0.0
        self.stopped = False
        """At the last look."""
        self._looked = now()

    def look(self) -> bool:
        """Look; whether it has been stopped for too long."""
        now, before = self._now(), self.stopped
        self.stopped = is_stopped(self._pid)
        if self.stopped and before:
            self.seconds += min(now - self._looked, _LONGEST_S)
        elif not self.stopped:
            self.seconds = 0.0
        self._looked = now
        return self._limit is not None and self.seconds >= self._limit
