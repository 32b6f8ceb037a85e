"""Waits for what never comes, over a store whose own limits are slow: a ``TCPStore`` that looks up
host names for the warning which it writes then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from dcp_engine.coordination.handshake import agree_on_session
from dcp_engine.coordination.interface import Deadlines, Decision
from dcp_engine.coordination.keys import HandshakeKeys
from dcp_engine.coordination.limits import LimitKeeper
from dcp_engine.coordination.memory_store import MemoryStore
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.simulated import run_simulated
from dcp_engine.coordination.store import StoreSession
from dcp_engine.coordination.store_client import StoreClient
from dcp_engine.errors import CheckpointException, CoordinationError

_RHYTHM = Rhythm(interval=0.05, grace=0.1, idle_poll=0.02)
_PATIENCE = 20.0


class _Freezable(MemoryStore):
    """Its ``get`` never ends by its own limit; a frozen view says nothing any more."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner._shared)
        self.thaw = threading.Event()
        self.thaw.set()

    def clone(self) -> _Freezable:
        return _Freezable(self)

    def get(self, key: str, /) -> bytes:
        self._timeout = 1000.0
        return super().get(key)

    def _change(self, key: str, change: Callable[[bytes | None], bytes]) -> bytes:
        self.thaw.wait(_PATIENCE)
        return super()._change(key, change)


def _step(session: StoreSession, deadlines: Deadlines, *steps: Callable[[], bytes]) -> None:
    with session.begin("save", "somewhere", deadlines=deadlines) as operation:
        for index, local in enumerate(steps):
            operation.step(f"step {index}", local, lambda _: Decision())


def _views(session: StoreSession) -> list[_Freezable]:
    return [client._store for client in session._clients]  # type: ignore[misc]


def _run(ranks: int, fn: Callable[[StoreSession], Any]) -> tuple[list[Any], MemoryStore]:
    store = _Freezable(MemoryStore())
    began = time.monotonic()
    outcomes = run_simulated(ranks, fn, rhythm=_RHYTHM, timeout=3 * _PATIENCE, store=store)
    assert time.monotonic() - began < 2 * _PATIENCE
    return outcomes, store


def _assert_coordinator_missing(outcome: Any, kind: str) -> None:
    assert isinstance(outcome, CheckpointException)
    assert (outcome.kind, list(outcome.failures)) == (kind, [0])
    assert "missing rank 0, the coordinator" in str(outcome)


def test_a_coordinator_that_never_begins() -> None:
    gone = threading.Event()

    def on_rank(session: StoreSession) -> None:
        if session.rank == 0:
            assert gone.wait(_PATIENCE)
            return
        try:
            _step(session, Deadlines(timeout=0.5), lambda: b"")
        finally:
            gone.set()

    outcomes, _ = _run(3, on_rank)
    for outcome in outcomes[1:]:
        _assert_coordinator_missing(outcome, "timeout")


def test_a_coordinator_that_falls_silent() -> None:
    done = threading.Semaphore(0)
    connections = [0, 0, 0]

    def on_rank(session: StoreSession) -> None:
        deadlines = Deadlines(timeout=_PATIENCE, stall_timeout=0.5)

        def fall_silent() -> bytes:
            for view in _views(session):
                view.thaw.clear()
            for _ in range(2):
                assert done.acquire(timeout=_PATIENCE)
            for view in _views(session):
                view.thaw.set()
            return b""

        try:
            _step(session, deadlines, lambda: b"", fall_silent if session.rank == 0 else bytes)
        finally:
            connections[session.rank] = session.counters.connections
            done.release()

    outcomes, store = _run(3, on_rank)
    for outcome in outcomes[1:]:
        _assert_coordinator_missing(outcome, "stalled")
        assert "last heard" in str(outcome)
    held = store.keys()
    # What one rank says in its place all others hear.
    assert connections == [1, 2, 1]
    # The coordinator learns what became of it, and whoever is last has cleaned up.
    _assert_coordinator_missing(outcomes[0], "stalled")
    assert [key for key in held if "/e/" in key] == []


def test_a_failure_that_no_coordinator_hears_of() -> None:
    gone = threading.Event()

    def on_rank(session: StoreSession) -> None:
        if session.rank == 0:
            assert gone.wait(_PATIENCE)
            return

        def fail() -> bytes:
            raise ValueError("boom")

        try:
            _step(session, Deadlines(timeout=0.5, stall_timeout=0.5), fail)
        finally:
            gone.set()

    outcomes, _ = _run(2, on_rank)
    assert isinstance(outcomes[1], CheckpointException)
    assert "missing rank 0, the coordinator" in str(outcomes[1])


def test_connections_for_last_words_are_not_kept() -> None:
    """And what they said is counted."""
    counts: list[int] = []

    def on_rank(session: StoreSession) -> None:
        if session.rank == 0:
            return
        for _ in range(2):
            with pytest.raises(CheckpointException):
                _step(session, Deadlines(timeout=0.2), lambda: b"")
        counts.append(len(session._clients))
        assert session.counters.connections == 3
        assert session.counters.calls["compare_set"] == 4

    outcomes, _ = _run(2, on_rank)
    assert outcomes == [None, None]
    assert counts == [1]


def test_a_leader_that_never_comes() -> None:
    with pytest.raises(CoordinationError, match="rank 1 was not welcomed by rank 0") as caught:
        _open_alone(_Freezable(MemoryStore()))
    assert caught.value.kind == "timeout"


def test_a_leader_that_never_decides() -> None:
    store = _Freezable(MemoryStore())
    session = "0123456789abcdef"
    welcome = HandshakeKeys("dcp_engine/simulated").welcome("")

    def lead() -> None:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and len(_nonces(store)) == 0:
            threading.Event().wait(0.01)
        for nonce in _nonces(store):
            store.set(welcome + nonce, session.encode())

    leader = threading.Thread(target=lead)
    leader.start()
    with pytest.raises(CoordinationError, match="rank 0 gave no verdict on the handshake"):
        _open_alone(store)
    leader.join()


def _nonces(store: MemoryStore) -> list[str]:
    """Of those that wait to be welcomed."""
    return [key.rpartition("/")[2] for key in store._shared.waiting if "/welcome/" in key]


def _open_alone(store: MemoryStore) -> None:
    client = StoreClient(store.clone(), "memory")
    keeper = LimitKeeper(lambda: StoreClient(store.clone(), "memory"))
    over = threading.Event()

    def look() -> None:
        pause = 0.0
        while not over.wait(pause):
            pause = min(keeper.look(client.limit), 0.05)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        agree_on_session(
            client, "dcp_engine/simulated", rank=1, world_size=2, host="here", timeout=0.3
        )
    finally:
        over.set()
        looking.join()
