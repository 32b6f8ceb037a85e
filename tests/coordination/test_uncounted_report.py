"""A rank reports first and counts its report after: one that dies in between has reported."""

from __future__ import annotations

import threading

from dcp_engine.coordination.interface import Deadlines, Decision
from dcp_engine.coordination.memory_store import MemoryStore
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.simulated import run_simulated
from dcp_engine.coordination.store import StoreSession
from dcp_engine.coordination.words import REPORT
from dcp_engine.errors import CheckpointException

_RHYTHM = Rhythm(interval=0.05, grace=0.2, idle_poll=0.02)


class _StoppingStore(MemoryStore):
    """Lets no report be counted before ``over``."""

    def __init__(self, inner: MemoryStore, over: threading.Event) -> None:
        super().__init__(inner._shared)
        self._over = over

    def clone(self) -> _StoppingStore:
        return _StoppingStore(self, self._over)

    def add(self, key: str, amount: int, /) -> int:
        if key.endswith("/c") and amount == REPORT:
            self._over.wait(60.0)
        return super().add(key, amount)


def test_a_rank_that_stops_before_its_report_is_counted() -> None:
    """Its report is used; in the next step it is named as missing. Nobody waits for ever."""
    over = threading.Event()
    decided: list[list[bytes]] = []
    named: list[CheckpointException] = []

    def decide(reports: list[bytes]) -> Decision:
        decided.append(reports)
        return Decision(common=b"done")

    def on_rank(session: StoreSession) -> None:
        rank = session.rank
        deadlines = Deadlines(timeout=20.0, stall_timeout=0.5)
        try:
            with session.begin("save", "somewhere", deadlines=deadlines) as operation:
                operation.step("write", lambda: b"%d" % rank, decide)
                operation.step("next", lambda: b"", lambda _: Decision())
        except CheckpointException as error:
            if rank == 0:
                named.append(error)
        finally:
            if rank == 0:
                over.set()

    store = _StoppingStore(MemoryStore(), over)
    run_simulated(2, on_rank, rhythm=_RHYTHM, timeout=40.0, store=store)
    assert decided == [[b"0", b"1"]]
    assert [(error.kind, list(error.failures)) for error in named] == [("stalled", [1])]
