"""A session of one rank: world size 1, and ``no_dist``.

Belongs here: the interface without anybody to talk to. Failures have the same form as with many
ranks, so that whoever handles them needs no second case.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from dcp_engine.coordination.answers import checked_answers
from dcp_engine.coordination.clock import OperationClock
from dcp_engine.coordination.failures import capture, exception_of, raised_by_exit
from dcp_engine.coordination.identity import identity_here
from dcp_engine.coordination.interface import (
    Deadlines,
    Decision,
    Operation,
    OperationKind,
    Outcome,
    RunIdentity,
    Session,
    SessionHandle,
)
from dcp_engine.coordination.numbers import Numbers
from dcp_engine.errors import UsageError

__all__ = ["SingleOperation", "SingleSession", "SingleSessionHandle"]


class SingleOperation(Operation):
    """One save or load on one rank."""

    def __init__(
        self,
        number: int,
        kind: OperationKind,
        checkpoint_id: str,
        deadlines: Deadlines,
        *,
        known_as: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank = 0
        self.world_size = 1
        self.coordinator_rank = 0
        self.number = number
        self._known_as = known_as
        self._kind = kind
        self._checkpoint = checkpoint_id
        self._clock = OperationClock(deadlines, kind, checkpoint_id, now=now)
        self._decision: Outcome | None = None
        self._lock = threading.Lock()
        self._closed = False

    def step(
        self,
        phase: str,
        local: Callable[[], bytes],
        decide: Callable[[list[bytes]], Decision],
        *,
        decide_phase: str | None = None,
        regardless: bool = False,
    ) -> tuple[bytes, bytes]:
        """Run ``local``, then ``decide``; see the interface."""
        if self._closed:
            raise UsageError(f"{self._kind} {self.number} is closed", checkpoint=self._checkpoint)
        self._clock.enter(phase)
        try:
            if not regardless:
                self.check()
            report = bytes(local())
            self.check()
            if decide_phase is not None:
                phase = decide_phase
                self._clock.enter(phase)
            decision = decide([report])
            per_rank = checked_answers(decision, self.world_size)
        except BaseException as error:
            self._fail(phase, error)
        return decision.common, per_rank[0] if per_rank is not None else b""

    def _fail(self, phase: str, error: BaseException) -> NoReturn:
        if raised_by_exit(error):
            raise error
        raise exception_of(
            [capture(self._known_as, error, skip_frames=1)],
            doing=f'{self._kind} in phase "{phase}"',
            checkpoint=self._checkpoint,
            local=(self._known_as, error),
        ) from error

    def check(self) -> None:
        """Raise ``timeout`` if a deadline passed."""
        self._clock.check()

    def decide_once(self, outcome: Outcome) -> Outcome:
        """The first proposal wins."""
        with self._lock:
            self._decision = self._decision or outcome
            return self._decision

    def close(self) -> None:
        """Nothing is held; ``step`` may not be called any more."""
        self._closed = True


@dataclass(frozen=True, kw_only=True)
class SingleSessionHandle(SessionHandle):
    """A session of one rank, on its way to another process."""

    identity: RunIdentity
    rank: int = 0
    world_size: int = 1
    known_as: int = 0

    def attach(self) -> SingleSession:
        """The same session here; see the interface."""
        return SingleSession(
            identity_here(self.identity), known_as=self.known_as, numbers=Numbers(borrowed=True)
        )


class SingleSession(Session):
    """A session of one rank.

    Args:
        known_as: the rank that its failures name: this process may have one among others, whom it
            does not talk to.
        numbers: whence its operations have their numbers; by default its own.
    """

    def __init__(
        self, identity: RunIdentity, *, known_as: int = 0, numbers: Numbers | None = None
    ) -> None:
        self.rank = 0
        self.world_size = 1
        self.identity = identity
        self._known_as = known_as
        self._numbers = Numbers() if numbers is None else numbers
        self._closed = False

    def begin(
        self,
        kind: OperationKind,
        checkpoint_id: str,
        *,
        deadlines: Deadlines,
        coordinator_rank: int = 0,
        number: int | None = None,
    ) -> SingleOperation:
        """Take the next number; see the interface."""
        if self._closed:
            raise UsageError("the session is closed", checkpoint=checkpoint_id)
        if coordinator_rank != 0:
            raise UsageError(
                f"coordinator_rank is {coordinator_rank}, but there is one rank: 0",
                checkpoint=checkpoint_id,
            )
        return SingleOperation(
            self._numbers.given(number), kind, checkpoint_id, deadlines, known_as=self._known_as
        )

    def take_number(self) -> int:
        """The next number; see the interface."""
        return self._numbers.take()

    def handle(self) -> SingleSessionHandle:
        """What another process needs to go on with this session."""
        return SingleSessionHandle(identity=self.identity, known_as=self._known_as)

    def close(self) -> None:
        """No connection is held."""
        self._closed = True
