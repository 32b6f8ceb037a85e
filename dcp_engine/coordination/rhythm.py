"""How often the ranks of a group speak.

Belongs here: the intervals and why they have these values. Does not belong here: deadlines, which
are the caller's (``clock``).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Rhythm"]


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """Seconds between the messages of an operation."""

    interval: float = 1.0
    """Between a rank's heartbeats, and between the coordinator's ticks. A heartbeat also looks for
    an alarm."""
    grace: float = 0.75
    """How long the coordinator waits after the first failure for the others' own."""
    poll_min: float = 0.0005
    poll_max: float = 0.05
    """The coordinator alone looks for reports, at a tenth of the time it has waited, within these
    bounds."""
    idle_poll: float = 0.1
    """The coordinator looks for failures while it is busy itself."""

    @classmethod
    def for_world(cls, world_size: int) -> Rhythm:
        """At most 450 heartbeats a second in the whole job (with what else is said, some 500
        operations of the store); and at least 0.5 s apart. Up to 450 ranks a failure is seen
        everywhere within a second."""
        return cls(interval=max(0.5, world_size / 450))

    @property
    def slack(self) -> float:
        """How long after a deadline the coordinator's own verdict may still be on its way."""
        return self.grace + 2 * self.interval + 1.0

    def poll_after(self, waited: float) -> float:
        """Seconds until the next look, after having waited so long."""
        return min(max(waited / 10, self.poll_min), self.poll_max)
