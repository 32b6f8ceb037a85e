"""A collective that breaks when a worker dies: whose failure it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dcp_engine.async_saver import lost_worker
from dcp_engine.async_saver.watched import WatchedOperation
from dcp_engine.async_saver.worker_group import join_group
from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.errors import CoordinationError

WORD = CoordinationError("another rank failed", kind="interrupted")
BROKEN = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer")


class Agreed(Operation):
    """All ranks say the same; ``word`` comes with the ``checks``-th check, or not at all."""

    rank, world_size, coordinator_rank, number = 0, 2, 0, 0

    def __init__(self, checks: int | None) -> None:
        self.checks = checks

    def step(
        self,
        phase: str,
        local: Callable[[], bytes],
        decide: Callable[[list[bytes]], Decision],
        **options: Any,
    ) -> tuple[bytes, bytes]:
        return bytes(decide([local()] * 2).common), b""

    def check(self) -> None:
        if self.checks is not None:
            self.checks -= 1
            if self.checks <= 0:
                raise WORD

    def decide_once(self, outcome: Any) -> Any:
        return outcome

    def close(self) -> None:
        self.checks = None


def fail(error: BaseException) -> bytes:
    raise error


def step(checks: int | None, error: BaseException) -> None:
    failed: list[BaseException] = []
    operation = WatchedOperation(Agreed(checks), lambda phase: None, failed.append)
    try:
        operation.step("plan", lambda: fail(error), lambda _: Decision())
    finally:
        assert len(failed) == 1


def join(checks: int | None, error: CoordinationError) -> int:
    def ensure(generation: int) -> None:
        assert generation == 5
        raise error from BROKEN

    return join_group(Agreed(checks), joined=0, seen=4, ensure=ensure, before=lambda: None)


def test_a_broken_connection_is_not_the_first_cause() -> None:
    with pytest.raises(CoordinationError, match="another rank failed"):
        step(5, BROKEN)
    with pytest.raises(CoordinationError, match="another rank failed"):
        join(5, CoordinationError("they did not meet", kind="timeout"))


def test_it_is_if_no_word_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_worker, "_WORD_TAKES", 0.01)
    with pytest.raises(RuntimeError, match="reset by peer"):
        step(None, BROKEN)
    with pytest.raises(CoordinationError, match="did not meet"):
        join(None, CoordinationError("they did not meet", kind="timeout"))


@pytest.mark.parametrize("error", [RuntimeError("mine"), OSError("gloo"), SystemExit("gloo")])
def test_other_errors_are_raised_at_once(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        step(1, error)
    assert caught.value is error
