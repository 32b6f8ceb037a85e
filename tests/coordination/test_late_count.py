"""A rank that is slow between publishing its report and counting it: the coordinator has used the
report meanwhile, and the verdict is out before the rank begins to wait for it."""

from __future__ import annotations

import threading

import pytest

from dcp_engine.coordination.interface import Deadlines, Decision
from dcp_engine.coordination.memory_store import MemoryStore
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.simulated import run_simulated
from dcp_engine.coordination.store import StoreSession
from dcp_engine.coordination.words import EVENT, REPORT

_RHYTHM = Rhythm(interval=0.05, grace=0.2, idle_poll=0.02)


class _SlowStore(MemoryStore):
    """Counts the first report only once so many events are out."""

    def __init__(self, inner: MemoryStore, events: int, out: threading.Semaphore) -> None:
        super().__init__(inner._shared)
        self._events = events
        self._out = out

    def clone(self) -> _SlowStore:
        return _SlowStore(self, self._events, self._out)

    def add(self, key: str, amount: int, /) -> int:
        if key.endswith("/c") and amount == REPORT:
            for _ in range(self._events):
                assert self._out.acquire(timeout=60.0)
            self._events = 0
        value = super().add(key, amount)
        if key.endswith("/c") and amount == EVENT:
            self._out.release()
        return value


@pytest.mark.parametrize("events", [2, 3, 6])  # the first tick, the verdict, and ticks
def test_the_verdict_is_not_missed_in_the_next_step(events: int) -> None:
    seen: list[list[bytes]] = []

    def on_rank(session: StoreSession) -> None:
        deadlines = Deadlines(timeout=20.0, stall_timeout=0.5)
        with session.begin("save", "somewhere", deadlines=deadlines) as operation:
            first, _ = operation.step("plan", lambda: b"", lambda _: Decision(common=b"first"))
            second, _ = operation.step("write", lambda: b"", lambda _: Decision(common=b"second"))
            seen.append([first, second])

    store = _SlowStore(MemoryStore(), events, threading.Semaphore(0))
    run_simulated(2, on_rank, rhythm=_RHYTHM, timeout=40.0, store=store)
    assert seen == [[b"first", b"second"]] * 2


def test_the_verdict_is_not_missed_when_the_coordinator_has_left() -> None:
    seen: list[bytes] = []
    out = threading.Semaphore(0)

    def on_rank(session: StoreSession) -> None:
        deadlines = Deadlines(timeout=20.0, stall_timeout=0.5)
        with session.begin("save", "somewhere", deadlines=deadlines) as operation:
            seen.append(operation.step("plan", lambda: b"", lambda _: Decision(common=b"first"))[0])
        if session.rank == 0:
            out.release()

    # The first tick, the verdict, and then the word of the coordinator that it has left.
    run_simulated(2, on_rank, rhythm=_RHYTHM, timeout=40.0, store=_SlowStore(MemoryStore(), 3, out))
    assert seen == [b"first"] * 2
