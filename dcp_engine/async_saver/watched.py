"""An operation that tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

from dcp_engine.async_saver.lost_worker import heeding_a_lost_worker
from dcp_engine.coordination.interface import Decision, Operation, Outcome

__all__ = ["WatchedOperation"]


class WatchedOperation(Operation):
    """``inner``, with a call of ``look(phase)`` at the begin of each phase and at every check. A
    step that fails because a worker of another rank died does not count as this rank's failure.

    Args:
        look: called from the threads that call the operation's methods; must be fast.
        failed: called with what a step raises, which is what the operation fails with.
    """

    def __init__(
        self,
        inner: Operation,
        look: Callable[[str], None],
        failed: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.coordinator_rank = inner.coordinator_rank
        self.number = inner.number
        self._inner = inner
        self._look = look
        self._failed = failed
        self._phase = ""

    def step(
        self,
        phase: str,
        local: Callable[[], bytes],
        decide: Callable[[list[bytes]], Decision],
        *,
        decide_phase: str | None = None,
        regardless: bool = False,
    ) -> tuple[bytes, bytes]:
        """See the interface."""
        self._enter(phase)

        def local_heeding() -> bytes:
            return heeding_a_lost_worker(local, self._inner.check)

        def decide_watched(messages: list[bytes]) -> Decision:
            self._enter(decide_phase or phase)
            return decide(messages)

        try:
            return self._inner.step(
                phase,
                local_heeding,
                decide_watched,
                decide_phase=decide_phase,
                regardless=regardless,
            )
        except BaseException as error:
            if self._failed is not None:
                self._failed(error)
            raise

    def check(self) -> None:
        """See the interface."""
        self._look(self._phase)
        self._inner.check()

    def decide_once(self, outcome: Outcome) -> Outcome:
        """See the interface."""
        return self._inner.decide_once(outcome)

    def close(self) -> None:
        """See the interface."""
        self._inner.close()

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._look(phase)
