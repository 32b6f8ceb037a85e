"""A thread that pauses for next to nothing, between requests, goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from dcp_engine.coordination.memory_store import MemoryStore
from dcp_engine.coordination.store_client import StoreClient
from dcp_engine.coordination.store_thread import StoreThread
from dcp_engine.executors.process.inboxes import Inboxes

TURNS = 100_000
NEXT_TO_NOTHING = 1e-9
"""Seconds: over before a wait can begin."""


class _Restless:
    """A role that is due again at once; every other turn a request comes meanwhile."""

    def __init__(self) -> None:
        self.turns = 0
        self.request: Callable[[], None] | None = None
        self.enough = threading.Event()

    def turn(self) -> float:
        if self.request is None:
            return 0.001
        self.turns += 1
        if self.turns % 2:
            self.request()
        if self.turns < TURNS:
            return NEXT_TO_NOTHING
        self.enough.set()
        return 0.05


def test_the_store_thread_goes_on() -> None:
    role = _Restless()
    thread: StoreThread[Any] = StoreThread(
        lambda: StoreClient(MemoryStore(), "memory"),
        lambda _: cast(Any, role),
        lambda: StoreClient(MemoryStore(), "memory"),
        lambda _: None,
        name="restless",
        slack=1.0,
        connect_limit=5.0,
    )
    role.request = lambda: thread.tell(lambda role: None, lambda error: None)
    assert role.enough.wait(20), f"it stopped after {role.turns} turns"
    assert thread.stop(5)


def test_a_wait_for_an_answer_ends() -> None:
    ended = threading.Event()

    def wait() -> None:
        _, inbox = Inboxes().open()
        for _ in range(TURNS):
            inbox.put(None)
            inbox.get()
            with pytest.raises(queue.Empty):
                inbox.get(timeout=NEXT_TO_NOTHING)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    assert ended.wait(20)
