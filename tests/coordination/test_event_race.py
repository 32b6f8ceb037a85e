"""The coordinator publishes an event first and counts it after: what a rank sees in between.

A rank that takes the verdict of a step at once, does its part of the next step and reports it finds
a tally in which that verdict is not counted yet. It must wait for the next event then, not take the
old one again as the verdict of the new step.
"""

from __future__ import annotations

import threading

from dcp_engine.coordination.interface import Deadlines, Decision
from dcp_engine.coordination.memory_store import MemoryStore
from dcp_engine.coordination.messages import Event, decode
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.simulated import results_of, run_simulated
from dcp_engine.coordination.store import StoreSession
from dcp_engine.coordination.words import EVENT, REPORT

_SILENT = Rhythm(interval=1000.0)
"""Ticks and heartbeats at the begin only."""
_PATIENCE = 30.0


class _Hold:
    """Holds the count of the first verdict until the participant's second report is counted."""

    def __init__(self) -> None:
        self.verdict_published = False
        self.held = False
        self.reports = 0
        self.second_report = threading.Event()
        self.released_in_time = False


class _HoldingStore(MemoryStore):
    """A ``MemoryStore`` whose views all know one ``_Hold``."""

    def __init__(self, inner: MemoryStore, hold: _Hold) -> None:
        super().__init__(inner._shared)
        self._hold = hold

    def clone(self) -> _HoldingStore:
        return _HoldingStore(self, self._hold)

    def multi_set(self, keys: list[str], values: list[bytes], /) -> None:
        for key, value in zip(keys, values, strict=True):
            if "/e/" in key and decode(value[1:], Event).kind == "verdict":
                self._hold.verdict_published = True
        super().multi_set(keys, values)

    def add(self, key: str, amount: int, /) -> int:
        hold = self._hold
        is_tally = key.endswith("/c")
        if is_tally and amount == EVENT and hold.verdict_published and not hold.held:
            hold.held = True
            hold.released_in_time = hold.second_report.wait(_PATIENCE)
        value = super().add(key, amount)
        if is_tally and amount == REPORT:
            hold.reports += 1
            if hold.reports == 2:
                hold.second_report.set()
        return value


def test_a_verdict_that_is_not_counted_yet_is_not_taken_again() -> None:
    hold = _Hold()

    def three_steps(session: StoreSession) -> list[tuple[bytes, bytes]]:
        deadlines = Deadlines(timeout=2 * _PATIENCE, stall_timeout=None)
        with session.begin("save", "c", deadlines=deadlines) as operation:
            return [
                operation.step(
                    "step",
                    lambda i=i: f"{session.rank}.{i}".encode(),
                    lambda reports: Decision(common=b"|".join(reports), per_rank=reports),
                )
                for i in range(3)
            ]

    results = results_of(
        run_simulated(
            2,
            three_steps,
            rhythm=_SILENT,
            timeout=2 * _PATIENCE,
            store=_HoldingStore(MemoryStore(), hold),
        )
    )
    assert hold.released_in_time
    for rank, steps in enumerate(results):
        assert steps == [(f"0.{i}|1.{i}".encode(), f"{rank}.{i}".encode()) for i in range(3)]
