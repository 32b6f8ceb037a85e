"""Sessions over an in-memory store: the protocol, with ranks that are threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dcp_engine.coordination.interface import Deadlines, Decision, Operation
from dcp_engine.coordination.memory_store import MemoryStore
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.simulated import results_of, run_simulated
from dcp_engine.coordination.store import StoreSession
from dcp_engine.errors import CheckpointException, UsageError
from tests.coordination import cases
from tests.coordination.cases import DEADLINES, PATIENT, RHYTHM, echo, one_step, outcome


def run(world_size: int, fn: Any, rhythm: Rhythm = PATIENT, **options: Any) -> list[Any]:
    return results_of(run_simulated(world_size, fn, rhythm=rhythm, **options))


@pytest.mark.parametrize("world_size", [1, 2, 7, 32])
@pytest.mark.parametrize("coordinator", [0, -1])
def test_every_rank_gets_the_decision(world_size: int, coordinator: int) -> None:
    def steps(session: StoreSession) -> list[tuple[bytes, bytes]]:
        with session.begin(
            "save", "c", deadlines=DEADLINES, coordinator_rank=coordinator % world_size
        ) as operation:
            return [
                operation.step("s", lambda i=i: f"{session.rank}.{i}".encode(), echo)
                for i in range(3)
            ]

    for rank, results in enumerate(run(world_size, steps)):
        for index, (common, own) in enumerate(results):
            assert common == b"|".join(f"{r}.{index}".encode() for r in range(world_size))
            assert own == f"to {rank}.{index}".encode()


@pytest.mark.parametrize("how", list(cases.ERRORS))
@pytest.mark.parametrize("failing", [[0], [2], [0, 1, 2], [1, 2]])
@pytest.mark.parametrize("coordinator", [0, 2])
def test_failures_in_local(how: str, failing: list[int], coordinator: int) -> None:
    meet = threading.Barrier(3).wait
    results = run(3, lambda session: cases.fail_in_local(session, failing, how, coordinator, meet))
    for rank, result in enumerate(results):
        assert result["after"] == b"0|1|2"
        if rank in failing and how in ("interrupt", "exit"):
            assert result["type"] in ("KeyboardInterrupt", "SystemExit")
            continue
        if coordinator in failing and how in ("interrupt", "exit"):
            # it waits for nobody: who failed at the same moment may not be named
            assert coordinator in result["ranks"]
            continue
        assert set(result["ranks"]) <= set(failing)
        assert sorted(result["ranks"]) == failing or how in ("interrupt", "exit")


@pytest.mark.parametrize("how", list(cases.ERRORS))
@pytest.mark.parametrize("coordinator", [0, 1])
def test_failures_in_decide(how: str, coordinator: int) -> None:
    results = run(3, lambda session: cases.fail_in_decide(session, how, coordinator))
    for rank, result in enumerate(results):
        assert result["after"] == b"0|1|2"
        if rank != coordinator:
            assert result["ranks"] == [coordinator]
        if result["type"] == "CheckpointException":
            assert 'in phase "commit"' in result["text"], "all ranks say where it failed"


@pytest.mark.parametrize("failing", [[], [0], [1], [0, 1]])
def test_nothing_is_written_after_the_keys_are_removed(failing: list[int]) -> None:
    """Heartbeats, ticks and looks are always due here, behind the last of an operation too."""
    store = MemoryStore()
    prefixes: list[str] = []
    meet = threading.Barrier(2).wait

    def fn(session: StoreSession) -> None:
        prefixes.append(session.prefix())
        cases.fail_in_local(session, failing, "plain", 0, meet)

    run(2, fn, Rhythm(interval=0.0, grace=10.0, idle_poll=0.0), store=store)
    left = store.keys()
    assert [key for key in left if key.startswith(prefixes[0])] == []


def test_the_first_cause_is_first_and_interruptions_are_no_failures() -> None:
    meet = threading.Barrier(4).wait

    def fn(session: StoreSession) -> Any:
        def local(operation: Operation) -> bytes:
            meet()
            if session.rank == 3:
                raise ValueError("the cause")
            if session.rank == 1:
                while True:
                    try:
                        operation.check()
                    except Exception as stopped:
                        raise OSError("a second failure") from stopped
            while True:
                operation.check()

        return outcome(lambda: one_step(session, local))

    for result in run(4, fn):
        assert result["ranks"] == [3, 1]
        assert result["types"][3] == "ValueError"
        assert result["text"].index("the cause") < result["text"].index("a second failure")


def test_who_failed_before_it_was_asked_is_named_too() -> None:
    rhythm = Rhythm(interval=0.02, grace=20.0)  # all have their say long before

    def fn(session: StoreSession) -> Any:
        def boom() -> bytes:
            raise ValueError(f"of rank {session.rank}")

        with session.begin("save", "c", deadlines=DEADLINES, coordinator_rank=1) as operation:
            operation.step("first", lambda: b"", echo)
            while session.rank == 0:
                try:
                    operation.check()
                except Exception:
                    break
            return outcome(
                lambda: operation.step("second", boom, echo, regardless=session.rank == 0)
            )

    for result in run(2, fn, rhythm=rhythm):
        assert result["ranks"] == [1, 0]


def test_a_failed_operation_stays_failed() -> None:
    meet = threading.Barrier(2).wait

    def fn(session: StoreSession) -> Any:
        with session.begin("save", "c", deadlines=DEADLINES) as operation:

            def boom() -> bytes:
                meet()
                return bytes(-1)

            first = outcome(lambda: operation.step("a", boom, echo))
            second = outcome(lambda: operation.step("b", lambda: b"", echo))
            assert first["ranks"] == second["ranks"]
            return sorted(first["ranks"]), operation.decide_once("abort")

    assert run(2, fn) == [([0, 1], "abort")] * 2


def test_a_wrong_number_of_answers_fails_everywhere() -> None:
    def fn(session: StoreSession) -> Any:
        return outcome(lambda: one_step(session, lambda _: b"", lambda _: Decision(per_rank=[b""])))

    for result in run(2, fn):
        assert (result["ranks"], result["kind"]) == ([0], "usage")


def test_who_comes_late_is_awaited() -> None:
    """No heartbeat is expected of a rank that has not begun: only the deadlines count."""
    deadlines = Deadlines(timeout=30.0, stall_timeout=0.2)
    others_wait = threading.Event()

    def fn(session: StoreSession) -> Any:
        if session.rank == 1:
            assert others_wait.wait(20)
            threading.Event().wait(0.8)

        def local(operation: Operation) -> bytes:
            others_wait.set()
            return b"x"

        return one_step(session, local, deadlines=deadlines)[0]

    assert run(3, fn) == [b"x|x|x"] * 3


def test_who_never_comes_is_named_at_the_deadline() -> None:
    def fn(session: StoreSession) -> Any:
        if session.rank == 1:
            return None
        deadlines = Deadlines(timeout=None, phases={"write": 0.5})
        return outcome(lambda: one_step(session, lambda _: b"", deadlines=deadlines))

    results = run(3, fn, rhythm=RHYTHM)
    for result in (results[0], results[2]):
        assert (result["kind"], result["ranks"]) == ("timeout", [1])
        assert "never heard" in result["text"]


def test_a_coordinator_that_never_comes_is_named_at_the_deadline() -> None:
    def fn(session: StoreSession) -> Any:
        if session.rank == 0:
            return None
        return outcome(lambda: one_step(session, lambda _: b"", deadlines=Deadlines(timeout=0.3)))

    for result in run(3, fn, rhythm=RHYTHM)[1:]:
        assert (result["kind"], result["ranks"]) == ("timeout", [0])


def test_who_has_reported_gives_the_others_their_time() -> None:
    """The limit of the coordinator's phase does not count while others still write."""
    deadlines = Deadlines(timeout=30.0, stall_timeout=None, phases={"commit": 0.2})
    rhythm = Rhythm(interval=0.02, grace=0.02)

    def fn(session: StoreSession) -> Any:
        def local(operation: Operation) -> bytes:
            if session.rank == 1:
                threading.Event().wait(rhythm.slack + 0.5)
            return b"x"

        return one_step(session, local, deadlines=deadlines)[0]

    assert run(3, fn, rhythm=rhythm) == [b"x|x|x"] * 3


def test_sessions_of_one_store_do_not_meet() -> None:
    store = MemoryStore()
    names = [
        results_of(run_simulated(2, lambda session: session.name, store=store))[0] for _ in range(3)
    ]
    assert len(set(names)) == 3
    assert store.keys() == []


def test_all_keys_are_removed() -> None:
    store = MemoryStore()
    meet = threading.Barrier(3).wait

    def fn(session: StoreSession) -> None:
        for _ in range(5):
            one_step(session, lambda _: b"x" * (5 << 20))
            with session.begin("save", "c", deadlines=DEADLINES) as operation:
                operation.decide_once("commit")
                operation.step("s", lambda: b"", echo)
            outcome(lambda: cases.fail_in_local(session, [1], "plain", meet=meet))
            outcome(lambda: cases.fail_in_local(session, [0], "exit", meet=meet))

    run(3, fn, store=store)
    assert store.keys() == []


def test_an_operation_that_did_nothing_costs_nothing() -> None:
    store = MemoryStore()

    def fn(session: StoreSession) -> int:
        before = session.counters.total
        session.begin("save", "c", deadlines=DEADLINES).close()
        return session.counters.total - before

    assert run(2, fn, store=store) == [0, 0]


def test_wrong_use() -> None:
    def fn(session: StoreSession) -> None:
        with pytest.raises(UsageError, match="ranks 0 to 1"):
            session.begin("save", "c", deadlines=DEADLINES, coordinator_rank=2)
        operation = session.begin("save", "c", deadlines=DEADLINES)
        operation.close()
        operation.close()
        with pytest.raises(UsageError, match="is closed"):
            operation.step("s", lambda: b"", echo)
        session.close()
        with pytest.raises(UsageError, match="is closed"):
            session.begin("save", "c", deadlines=DEADLINES)

    run(2, fn)


def test_ranks_with_another_world_size_are_told_apart() -> None:
    store = MemoryStore()
    identity = cases.run_identity("g")
    outcomes: dict[int, Any] = {}

    def open_as(rank: int, world_size: int) -> None:
        outcomes[rank] = outcome(
            lambda: StoreSession.open(
                store.clone,
                location="memory",
                rank=rank,
                world_size=world_size,
                identity=identity,
                timeout=0.5,
            )
        )

    threads = [threading.Thread(target=open_as, args=args) for args in ((0, 2), (1, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "rank 1 takes the group for one of 3 ranks, not 2" in outcomes[0]["text"]
    assert outcomes[1]["kind"] == "timeout"


def test_the_load_on_the_store_is_bounded_at_any_size() -> None:
    for world_size in (2, 100, 250, 1000, 10_000):
        rhythm = Rhythm.for_world(world_size)
        assert world_size / rhythm.interval <= 450 * (1 + 1e-9)
        assert rhythm.interval <= max(1.0, world_size / 450)


def test_an_exception_of_the_callers_own_reaches_the_others() -> None:
    def fn(session: StoreSession) -> Any:
        def body() -> None:
            with session.begin("save", "c", deadlines=DEADLINES) as operation:
                operation.step("a", lambda: b"", echo)
                if session.rank == 0:
                    raise LookupError("between steps")
                operation.step("b", lambda: b"", echo)

        return outcome(body)

    results = run(3, fn)
    assert results[0]["type"] == "LookupError"
    assert [result["ranks"] for result in results[1:]] == [[0], [0]]


def test_the_exception_is_an_exception() -> None:
    def fn(session: StoreSession) -> None:
        one_step(session, lambda _: bytes(-1))

    outcomes = run_simulated(2, fn, rhythm=RHYTHM)
    assert all(isinstance(error, CheckpointException) for error in outcomes)
