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
def server() -> Any:
    return stores.TCPStore("localhost", 0, None, True, wait_for_workers=False)


@pytest.fixture
def sessions(server: Any) -> Iterator[list[StoreSession]]:
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
        death = sessions[victim].report_death(
            0, coordinator_rank=0, error=CoordinationError("gone", kind="worker_died")
        )
        errors = {rank: future.result(30) for rank, future in others.items()}
        if begun:
            dead.close()  # only the test's own threads end by this
    assert death.outcome == "abort"
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
    for session in sessions[:2]:
        assert session.report_death(0, coordinator_rank=0, error=error).outcome == "commit"
    dead.close()


def test_a_rank_alone_has_nobody_to_tell() -> None:
    session = SingleSession(run_identity(""))
    error = CoordinationError("gone", kind="worker_died")
    number = session.take_number()
    death = session.report_death(number, coordinator_rank=0, error=error, checkpoint="c")
    assert (death.outcome, death.failure) == (None, None)
    session.remove_remains(number)


def end_on(session: StoreSession, *, fails: bool = False) -> BaseException | None:
    """The whole operation, which one rank may fail."""

    def local() -> bytes:
        if fails:
            raise ValueError("no more")
        return b""

    try:
        with session.begin("save", "c", deadlines=DEADLINES) as operation:
            operation.step("only", local, lambda _: Decision())
    except CheckpointException as error:
        return error
    return None


def test_it_learns_what_all_ranks_fail_with(sessions: list[StoreSession]) -> None:
    """Rank 2 fails; of rank 1 only its own process is left to say anything."""
    with ThreadPoolExecutor(WORLD) as pool:
        first = pool.submit(end_on, sessions[0])
        second = pool.submit(end_on, sessions[2], fails=True)
        error = CoordinationError("gone", kind="worker_died")
        death = sessions[1].report_death(0, coordinator_rank=0, error=error, checkpoint="c")
        others = [first.result(30), second.result(30)]
    assert death.failure is not None
    for other in others:
        assert isinstance(other, CheckpointException)
        assert list(death.failure.failures) == list(other.failures)
        assert death.failure.kind == other.kind


def test_it_learns_what_was_settled_before(sessions: list[StoreSession]) -> None:
    """Of the coordinator only its own process is left; another rank had given it up."""
    error = CoordinationError("gone", kind="worker_died")
    deaths = [
        sessions[0].report_death(0, coordinator_rank=0, error=error, checkpoint="c")
        for error in (error, CoordinationError("gone again", kind="worker_died"))
    ]
    assert [str(death.failure) for death in deaths] == [str(deaths[0].failure)] * 2


def test_a_rank_names_itself_where_its_own_death_came_too_late(
    sessions: list[StoreSession],
) -> None:
    error = CoordinationError("gone", kind="worker_died")
    of_0, of_1 = [
        sessions[rank].report_death(0, coordinator_rank=0, error=error, checkpoint="c").failure
        for rank in (0, 1)
    ]
    assert of_0 is not None and of_1 is not None
    assert (list(of_0.failures), list(of_1.failures)) == ([0], [0, 1])
    assert of_1.kind == "worker_died"


def keys_of(store: Any) -> int:
    return int(store.num_keys())


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("left", [True, False])
def test_what_a_dead_rank_leaves_can_be_removed(
    sessions: list[StoreSession], server: Any, victim: int, left: bool
) -> None:
    """It died before it was counted as gone, or after it, when nobody was left to be told."""
    before = keys_of(server)
    worker = sessions[victim].handle().attach()
    with ThreadPoolExecutor(WORLD) as pool:
        others = [pool.submit(end_on, s) for r, s in enumerate(sessions) if r != victim]
        dead = worker.begin("save", "c", deadlines=DEADLINES, number=0)
        dead.step("only", lambda: b"", lambda _: Decision())
        assert [other.result(30) for other in others] == [None, None]
        assert dead._thread is not None
        if left:
            dead.close()
            assert keys_of(server) == before
            error = CoordinationError("gone", kind="worker_died")
            sessions[victim].report_death(0, coordinator_rank=0, error=error)
        else:
            assert dead._thread.stop(30)  # it says nothing more
        assert keys_of(server) > before
        for rank in (victim, 2):
            sessions[rank].remove_remains(0)
        assert keys_of(server) == before
