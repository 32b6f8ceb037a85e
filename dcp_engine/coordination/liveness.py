"""Which ranks have been heard, as the coordinator sees it.

Belongs here: judging pulses by their arrival on the observer's own clock. Does not belong here:
reading them from the store, or any clock but the one handed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dcp_engine.coordination.clock import in_words
from dcp_engine.coordination.words import Pulse

__all__ = ["Liveness", "describe_missing"]


class Liveness:
    """The pulses of the other ranks over one operation."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._ranks = tuple(ranks)
        self._pulses: dict[int, Pulse] = {}
        self._heard: dict[int, float] = {}

    def observe(self, pulses: Mapping[int, Pulse], now: float) -> None:
        """Note the pulses that were read at ``now``; one that changed is a sign of life."""
        for rank, pulse in pulses.items():
            if self._pulses.get(rank) != pulse:
                self._pulses[rank] = pulse
                self._heard[rank] = now

    def missing(self, step: int) -> list[int]:
        """Ranks that have not reported for that step (counted from 0)."""
        return [
            rank
            for rank in self._ranks
            if rank not in self._pulses or self._pulses[rank].steps <= step
        ]

    def stalled(self, step: int, now: float, limit: float) -> list[int]:
        """Ranks that were heard once, have not reported, and are silent for ``limit`` seconds.

        A rank that was never heard has not begun the operation; how late it may be is for the
        deadlines to say.
        """
        return [
            rank
            for rank in self.missing(step)
            if rank in self._heard and now - self._heard[rank] > limit
        ]

    def silence(self, rank: int, now: float) -> float | None:
        """Seconds since the rank was heard; None if it never was."""
        return now - self._heard[rank] if rank in self._heard else None


def describe_missing(ranks: list[int], waited: str, silences: Iterable[float | None]) -> str:
    """``missing ranks [3, 7] in phase "write" after 30 s, last heard 12 s ago``."""
    heard = [silence for silence in silences if silence is not None]
    shown = ", ".join(map(str, ranks[:32])) + (", ..." if len(ranks) > 32 else "")
    text = f"missing ranks [{shown}] {waited}, "
    if not heard:
        return text + "never heard in this operation"
    low, high = min(heard), max(heard)
    if high - low < 1:
        return text + f"last heard {in_words(high)} ago"
    return text + f"last heard {in_words(low)} to {in_words(high)} ago"
