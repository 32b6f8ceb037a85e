"""Calls of the caller's around the commit.

Belongs here: the interface, and putting ``pre_commit`` where it belongs: after this rank's last
byte, before anybody commits.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from dcp_engine.coordination.interface import Decision, Operation, Outcome

__all__ = ["HookedOperation", "WriterHook"]

_WRITE_PHASE = "write"


class WriterHook(abc.ABC):
    """What to call around the commit of a checkpoint, on every rank.

    Args of both methods: the checkpoint's path, and the keyword arguments of ``write``.
    """

    @abc.abstractmethod
    def pre_commit(self, path: str, **kwargs: Any) -> None:
        """This rank's part is written, and the checkpoint is not committed. What this raises
        fails the write on all ranks."""

    @abc.abstractmethod
    def post_commit(self, path: str, **kwargs: Any) -> None:
        """The checkpoint is committed. What this raises, this rank's ``write`` raises; the
        checkpoint stays."""


class HookedOperation(Operation):
    """``inner``, with a call at the end of this rank's writing."""

    def __init__(self, inner: Operation, written: Callable[[], None]) -> None:
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.coordinator_rank = inner.coordinator_rank
        self.number = inner.number
        self._inner = inner
        self._written = written

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

        def local_and_hook() -> bytes:
            report = local()
            self._written()
            return report

        chosen = local_and_hook if phase == _WRITE_PHASE else local
        return self._inner.step(
            phase, chosen, decide, decide_phase=decide_phase, regardless=regardless
        )

    def check(self) -> None:
        """See the interface."""
        self._inner.check()

    def decide_once(self, outcome: Outcome) -> Outcome:
        """See the interface."""
        return self._inner.decide_once(outcome)

    def close(self) -> None:
        """See the interface."""
        self._inner.close()
