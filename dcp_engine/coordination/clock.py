"""The deadlines of one operation on one rank.

Belongs here: arithmetic on ``Deadlines`` and the monotonic clock. Does not belong here: waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dcp_engine.coordination.interface import Deadlines
from dcp_engine.errors import CoordinationError

__all__ = ["OperationClock", "in_words"]


def in_words(seconds: float) -> str:
    """``0.4 s``, ``12 s``."""
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"


class OperationClock:
    """Started when it is made. Read from any thread."""

    def __init__(
        self,
        deadlines: Deadlines,
        kind: str,
        checkpoint: str,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now = now
        self.deadlines = deadlines
        self.started = now()
        self._kind = kind
        self._checkpoint = checkpoint
        # replaced as one tuple, so that other threads see phase and time that belong together
        self._phase: tuple[str, float] = ("", self.started)

    @property
    def phase(self) -> str:
        """Name of the phase entered last."""
        return self._phase[0]

    @property
    def phase_age(self) -> float:
        """Seconds in the present phase."""
        return self.now() - self._phase[1]

    def enter(self, phase: str) -> None:
        """A phase begins; its own deadline counts from now."""
        self._phase = (phase, self.now())

    def remaining(self) -> float | None:
        """Seconds until the next deadline, negative if it passed; None if there is none."""
        phase, entered = self._phase
        now = self.now()
        left: list[float] = []
        if self.deadlines.timeout is not None:
            left.append(self.started + self.deadlines.timeout - now)
        if phase in self.deadlines.phases:
            left.append(entered + self.deadlines.phases[phase] - now)
        return min(left) if left else None

    def remaining_for_verdict(self, decide_phase: str) -> float | None:
        """Seconds that may pass until the coordinator's verdict, for a rank that has reported in
        the present phase: what is left of the phase for the others, and then the coordinator's
        own phase, if both are limited; and the whole operation's."""
        phase, entered = self._phase
        limits = self.deadlines.phases
        now = self.now()
        left: list[float] = []
        if self.deadlines.timeout is not None:
            left.append(self.started + self.deadlines.timeout - now)
        if phase in limits and phase == decide_phase:
            left.append(entered + limits[phase] - now)
        elif phase in limits and decide_phase in limits:
            left.append(entered + limits[phase] + limits[decide_phase] - now)
        return min(left) if left else None

    def waited(self) -> str:
        """What has been waited for how long, for messages: ``in phase "write" after 30 s``."""
        phase, entered = self._phase
        seconds = self.now() - (entered if phase in self.deadlines.phases else self.started)
        return f'in phase "{phase}" after {in_words(seconds)}'

    def check(self) -> None:
        """Raise ``CoordinationError(kind="timeout")`` if a deadline passed."""
        left = self.remaining()
        if left is not None and left <= 0:
            raise CoordinationError(
                f"{self._kind} ran out of time {self.waited()}",
                kind="timeout",
                checkpoint=self._checkpoint,
                hint="raise timeout= or phase_timeouts= if the medium is that slow",
            )
