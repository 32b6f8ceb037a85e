"""One rank's connection to the store breaks, while the store itself and the other ranks live."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from dcp_engine.coordination.interface import Deadlines, Decision
from dcp_engine.coordination.memory_store import MemoryStore
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.simulated import run_simulated
from dcp_engine.coordination.store import StoreSession
from dcp_engine.errors import CheckpointException

QUICK = Rhythm(interval=0.05, grace=0.2, idle_poll=0.02)
DEADLINES = Deadlines(timeout=30.0, stall_timeout=1.0)
CALLS = ("set", "get", "add", "check", "compare_set", "delete_key", "multi_get", "multi_set")


class Breakable(MemoryStore):
    """A view whose connection can be cut."""

    cut = False

    def clone(self) -> MemoryStore:
        return Breakable(self._shared)

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS and object.__getattribute__(self, "cut"):
            raise dist.DistNetworkError("Broken pipe\nException raised from sendBytes at x.cpp:1")
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("phase", ["agree", "write"])
@pytest.mark.parametrize("victim", [0, 1])
def test_it_is_named_there_and_missed_elsewhere(victim: int, phase: str) -> None:
    def on_rank(session: StoreSession) -> None:
        def local(here: str) -> bytes:
            if here == phase and session.rank == victim:
                for client in session._clients:
                    client._store.cut = True  # type: ignore[attr-defined]
            return b""

        with session.begin("save", "ckpt", deadlines=DEADLINES) as operation:
            for here in ("agree", "write"):
                operation.step(here, lambda here=here: local(here), lambda _: Decision())

    outcomes = run_simulated(3, on_rank, rhythm=QUICK, store=Breakable())
    for rank, error in enumerate(outcomes):
        assert isinstance(error, CheckpointException), error
        if rank == victim:
            assert (error.kind, error.failures) == ("store_lost", {})
            assert "the store at memory does not answer: Broken pipe" in str(error)
            assert "Exception raised from" not in str(error)
        else:
            assert (error.kind, list(error.failures)) == ("stalled", [victim])
            assert f"missing rank{'' if victim == 0 else 's'} " in str(error)
