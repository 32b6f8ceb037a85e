"""The two counters of an operation that live in the store, and how they are packed.

Belongs here: pure arithmetic on the counter words. Does not belong here: reading or writing them
(``store_client``), or what to do about them (``coordinator_role``, ``participant_role``).

One word per operation (``Tally``) counts reports, failures and events, so that one ``add`` both
tells the coordinator of a report and answers the reporter how many events came before it. One word
per rank (``Pulse``) is its heartbeat and, upwards of ``ALARM``, the coordinator's alarm to it, so
that one ``add`` beats and looks for an alarm: half the load on the store.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALARM", "EVENT", "FAILURE", "REPORT", "Pulse", "Tally", "arrived"]

_REPORT_BITS = 24  # 16 million reports: 2,000 steps of 8,192 ranks
_FAILURE_BITS = 14  # one failure a rank and operation at most

REPORT = 1
"""Added to the tally by a rank that has published its report."""
FAILURE = 1 << _REPORT_BITS
"""Added to the tally by a rank that has published a failure."""
EVENT = 1 << (_REPORT_BITS + _FAILURE_BITS)
"""Added to the tally by the coordinator after each event it has published."""

_BEAT_BITS = 32
ALARM = 1 << 60
"""A pulse at or above this value: the coordinator has seen a failure."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The operation's word, unpacked."""

    reports: int
    failures: int
    events: int

    @classmethod
    def unpack(cls, word: int) -> Tally:
        """Split a word read from the store."""
        return cls(
            reports=word & (FAILURE - 1),
            failures=(word & (EVENT - 1)) >> _REPORT_BITS,
            events=word >> (_REPORT_BITS + _FAILURE_BITS),
        )


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """A rank's word, unpacked."""

    steps: int
    """Reports that this rank has published in the operation."""
    beats: int
    alarm: bool

    @classmethod
    def unpack(cls, word: int) -> Pulse:
        """Split a word read from the store."""
        alarm = word >= ALARM
        low = word - ALARM if alarm else word
        return cls(steps=low >> _BEAT_BITS, beats=low & ((1 << _BEAT_BITS) - 1), alarm=alarm)


def arrived(steps: int) -> int:
    """The pulse of a rank that has just published its ``steps``-th report."""
    return steps << _BEAT_BITS
