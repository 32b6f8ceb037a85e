"""The session of one rank."""

from __future__ import annotations

import pytest

from dcp_engine.coordination.interface import Deadlines, Decision
from dcp_engine.coordination.simulated import simulated_identity
from dcp_engine.coordination.single import SingleOperation, SingleSession
from dcp_engine.errors import CheckpointException, CoordinationError, UsageError


@pytest.fixture
def session() -> SingleSession:
    return SingleSession(simulated_identity())


def test_a_step_hands_back_what_was_decided(session: SingleSession) -> None:
    with session.begin("save", "c", deadlines=Deadlines()) as operation:
        assert operation.is_coordinator
        result = operation.step(
            "plan",
            lambda: b"mine",
            lambda reports: Decision(common=reports[0], per_rank=[b"own"]),
        )
        assert result == (b"mine", b"own")
        assert operation.step("write", lambda: b"", lambda _: Decision()) == (b"", b"")


@pytest.mark.parametrize("where", ["local", "decide"])
def test_a_failure_names_rank_0(session: SingleSession, where: str) -> None:
    def boom(*_: object) -> bytes:
        raise ValueError("boom")

    operation = session.begin("save", "c", deadlines=Deadlines())
    with pytest.raises(CheckpointException) as caught:
        operation.step(
            "write",
            boom if where == "local" else lambda: b"",
            boom if where == "decide" else lambda _: Decision(),  # type: ignore[arg-type]
            decide_phase="commit",
        )
    assert list(caught.value.failures) == [0]
    exception, stack = caught.value.failures[0]
    assert isinstance(exception, ValueError)
    assert stack[-1].name == "boom"
    assert f'in phase "{"write" if where == "local" else "commit"}"' in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_exit_stays_an_exit(session: SingleSession, error: type[BaseException]) -> None:
    def leave() -> bytes:
        raise error

    operation = session.begin("save", "c", deadlines=Deadlines())
    with pytest.raises(error):
        operation.step("write", leave, lambda _: Decision())


def test_deadlines_are_seen_by_check() -> None:
    time = [0.0]
    deadlines = Deadlines(timeout=100.0, phases={"write": 5.0})
    operation = SingleOperation(0, "save", "c", deadlines, now=lambda: time[0])

    def slow() -> bytes:
        time[0] += 4.0
        operation.check()
        time[0] += 2.0
        operation.check()
        return b""

    with pytest.raises(CheckpointException) as caught:
        operation.step("write", slow, lambda _: Decision())
    assert caught.value.kind == "timeout"
    assert 'in phase "write" after 6.0 s' in str(caught.value)
    time[0] = 101.0
    with pytest.raises(CoordinationError, match="ran out of time"):
        operation.check()


def test_without_deadlines_nothing_is_late() -> None:
    time = [0.0]
    operation = SingleOperation(0, "load", "c", Deadlines(timeout=None), now=lambda: time[0])
    time[0] = 1e9
    operation.check()


def test_the_first_proposal_wins(session: SingleSession) -> None:
    operation = session.begin("save", "c", deadlines=Deadlines())
    assert operation.decide_once("abort") == "abort"
    assert operation.decide_once("commit") == "abort"


def test_wrong_use(session: SingleSession) -> None:
    with pytest.raises(UsageError, match="coordinator_rank is 1"):
        session.begin("save", "c", deadlines=Deadlines(), coordinator_rank=1)
    operation = session.begin("save", "c", deadlines=Deadlines())
    with pytest.raises(CheckpointException, match="2 answers for 1 ranks"):
        operation.step("s", lambda: b"", lambda _: Decision(per_rank=[b"", b""]))
    operation.close()
    operation.close()
    with pytest.raises(UsageError, match="is closed"):
        operation.step("s", lambda: b"", lambda _: Decision())
    session.close()
    with pytest.raises(UsageError, match="is closed"):
        session.begin("save", "c", deadlines=Deadlines())
