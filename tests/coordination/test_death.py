"""A rank's process reports that the one which stood for it is dead, at any point."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from dcp_engine.coordination.address import address_of, connect
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Deadlines, Decision, Operation
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.single import SingleSession
from dcp_engine.coordination.store import StoreSession
from dcp_engine.errors import CheckpointException, CoordinationError

WORLD = 3
DEADLINES = Deadlines(timeout=20.0, stall_timeout=15.0)
RHYTHM = Rhythm(interval=0.1, grace=0.2)
stores: Any = dist


@pytest.fixture
def sessions() -> Iterator[list[StoreSession]]:
    server = stores.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    address = address_of(server)
    assert address is not None

    def open_as(rank: int) -> StoreSession:
        return StoreSession.open(
            lambda: connect(address),
            location=str(address),
            address=address,
            rank=rank,
            world_size=WORLD,
            identity=run_identity("g"),
            timeout=20.0,
            rhythm=RHYTHM,
        )

    with ThreadPoolExecutor(WORLD) as pool:
        opened = list(pool.map(open_as, range(WORLD)))
    yield opened
    for session in opened:
        session.close()


def steps(operation: Operation, entered: threading.Event | None = None) -> None:
    """Two steps; ``entered`` is set in the second, which then waits for what becomes of it."""
    operation.step("first", lambda: b"", lambda _: Decision())

    def second() -> bytes:
        if entered is not None:
            entered.set()
        while True:
            operation.check()

    operation.step("second", second, lambda _: Decision())


def survive(session: StoreSession, entered: threading.Event, *, busy: bool) -> BaseException | None:
    """Another rank: in a long step, or waiting for the rest."""
    try:
        with session.begin("save", "c", deadlines=DEADLINES, number=0) as operation:
            if busy:
                steps(operation, entered)
            operation.step("first", lambda: b"", lambda _: Decision())
            entered.set()
            operation.step("second", lambda: b"", lambda _: Decision())
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_fail_by_name(
    sessions: list[StoreSession], victim: int, begun: bool, busy: bool
) -> None:
    for session in sessions:
        session.take_number()
    worker = sessions[victim].handle().attach()
    entered = {rank: threading.Event() for rank in range(WORLD)}
    with ThreadPoolExecutor(WORLD) as pool:
        others: dict[int, Future[BaseException | None]] = {
            rank: pool.submit(survive, sessions[rank], entered[rank], busy=busy)
            for rank in range(WORLD)
            if rank != victim
        }
        if begun:
            dead = worker.begin("save", "c", deadlines=DEADLINES, number=0)
            dead.step("first", lambda: b"", lambda _: Decision())
            for rank in others:
                assert entered[rank].wait(20)
        outcome = sessions[victim].report_death(
            0, coordinator_rank=0, error=CoordinationError("gone", kind="worker_died")
        )
        errors = {rank: future.result(30) for rank, future in others.items()}
        if begun:
            dead.close()  # only the test's own threads end by this
    assert outcome == "abort"
    for rank, error in errors.items():
        assert isinstance(error, CheckpointException), rank
        assert list(error.failures) == [victim], rank
        assert error.kind == "worker_died"
        assert "gone" in str(error)


def test_what_was_decided_stays(sessions: list[StoreSession]) -> None:
    for session in sessions:
        session.take_number()
    worker = sessions[0].handle().attach()
    dead = worker.begin("save", "c", deadlines=DEADLINES, number=0)
    assert dead.decide_once("commit") == "commit"
    error = CoordinationError("gone", kind="worker_died")
    assert sessions[0].report_death(0, coordinator_rank=0, error=error) == "commit"
    assert sessions[1].report_death(0, coordinator_rank=0, error=error) == "commit"
    dead.close()


def test_a_rank_alone_has_nobody_to_tell() -> None:
    session = SingleSession(run_identity(""))
    error = CoordinationError("gone", kind="worker_died")
    assert session.report_death(session.take_number(), coordinator_rank=0, error=error) is None
