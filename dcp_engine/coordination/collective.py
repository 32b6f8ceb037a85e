"""A session over object collectives, where no store can be reached.

Belongs here: the interface over a group that has a CPU backend. It promises less than
``store.StoreSession``: a failure reaches the others at the end of ``local``, not in the middle;
``check`` sees this rank's deadline only; deadlines hold where all waiting is monitored (gloo), and
elsewhere when the backend's own timeout fires; one operation at a time.

How a save ends is the coordinator's to say: it tells the others with each verdict.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import msgspec
import torch.distributed as dist

from dcp_engine.coordination.answers import checked_answers
from dcp_engine.coordination.clock import OperationClock
from dcp_engine.coordination.failures import (
    FailureRecord,
    capture,
    exception_of,
    raised_by_exit,
    silent_rank,
)
from dcp_engine.coordination.group import GroupInfo
from dcp_engine.coordination.interface import (
    Deadlines,
    Decision,
    Operation,
    OperationKind,
    Outcome,
    RunIdentity,
    Session,
)
from dcp_engine.coordination.liveness import describe_missing
from dcp_engine.coordination.messages import Heading, Report, decode, encode
from dcp_engine.coordination.numbers import Numbers
from dcp_engine.errors import CoordinationError, UsageError

__all__ = ["CollectiveOperation", "CollectiveSession"]

_FOREVER = 24 * 3600.0


class _Sent(msgspec.Struct, frozen=True):
    """From each rank to the coordinator: a report, or why there is none."""

    report: Report
    failure: FailureRecord | None = None


class _Verdict(msgspec.Struct, frozen=True):
    """From the coordinator to one rank."""

    common: bytes = b""
    answer: bytes = b""
    failures: list[FailureRecord] = []
    deciding: bool = False
    """It was ``decide`` that failed."""
    decision: Outcome | None = None


class CollectiveOperation(Operation):
    """Made by ``CollectiveSession.begin``."""

    def __init__(
        self,
        heading: Heading,
        *,
        group: Any,
        info: GroupInfo,
        deadlines: Deadlines,
        busy: threading.Lock,
    ) -> None:
        self.rank = info.rank
        self.world_size = info.world_size
        self.coordinator_rank = heading.coordinator
        self.number = heading.number
        self._heading = heading
        self._group = group
        self._root = info.global_ranks[heading.coordinator]
        self._monitored = dist.get_backend(group) == "gloo"
        self._clock = OperationClock(deadlines, heading.kind, heading.checkpoint)
        self._busy = busy
        self._step = -1
        self._decision: Outcome | None = None
        self._decision_lock = threading.Lock()
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
        """Gather, decide, scatter; see the interface."""
        if self._closed:
            raise UsageError(f"{self._heading.describe()} is closed")
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "another operation of this session is in a step",
                hint="without a store one operation runs at a time",
            )
        try:
            return self._run(phase, local, decide, decide_phase or phase, regardless)
        finally:
            self._busy.release()

    def _run(
        self,
        phase: str,
        local: Callable[[], bytes],
        decide: Callable[[list[bytes]], Decision],
        decide_phase: str,
        regardless: bool,
    ) -> tuple[bytes, bytes]:
        self._step += 1
        self._clock.enter(phase)
        payload, raised, failure = b"", None, None
        try:
            if not regardless:
                self.check()
            payload = bytes(local())
        except BaseException as error:
            raised, failure = error, capture(self.rank, error, skip_frames=1)
        report = Report(heading=self._heading, step=self._step, phase=phase, payload=payload)
        gathered = self._gather(_Sent(report=report, failure=failure), raised)
        self._clock.enter(decide_phase)
        verdicts: list[_Verdict] | None = None
        if gathered is not None:
            verdicts, decide_raised = self._decide(gathered, decide)
            raised = raised or decide_raised
        verdict = self._scatter(verdicts, raised)
        self._decision = self._decision or verdict.decision
        if raised is not None and raised_by_exit(raised):
            raise raised
        if verdict.failures:
            failed_in = decide_phase if verdict.deciding else phase
            raise exception_of(
                verdict.failures,
                doing=f'{self._heading.kind} in phase "{failed_in}"',
                checkpoint=self._heading.checkpoint,
                local=None if raised is None else (self.rank, raised),
            ) from raised
        return verdict.common, verdict.answer

    def _decide(
        self, gathered: list[_Sent], decide: Callable[[list[bytes]], Decision]
    ) -> tuple[list[_Verdict], BaseException | None]:
        failures = [sent.failure for sent in gathered if sent.failure is not None]
        own = gathered[self.rank].report
        failures += [
            silent_rank(
                rank,
                f"rank {self.rank} is in {own.heading.describe()}, step {own.step} "
                f'"{own.phase}", but rank {rank} in {sent.report.heading.describe()}, '
                f'step {sent.report.step} "{sent.report.phase}"',
                "out_of_step",
            )
            for rank, sent in enumerate(gathered)
            if (sent.report.heading, sent.report.step, sent.report.phase)
            != (own.heading, own.step, own.phase)
        ]
        raised: BaseException | None = None
        if not failures:
            try:
                decision = decide([sent.report.payload for sent in gathered])
                answers = checked_answers(decision, self.world_size)
                return [
                    _Verdict(
                        common=bytes(decision.common),
                        answer=b"" if answers is None else answers[rank],
                        decision=self._decision,
                    )
                    for rank in range(self.world_size)
                ], None
            except BaseException as error:
                raised = error
                failures = [capture(self.rank, error, skip_frames=1)]
        # All ranks are about to hear of the failure: what is not committed by now will not be.
        final = self._propose("abort")
        verdict = _Verdict(failures=failures, deciding=raised is not None, decision=final)
        return [verdict] * self.world_size, raised

    # -- talking -------------------------------------------------------------------------------

    def _gather(self, sent: _Sent, raised: BaseException | None) -> list[_Sent] | None:
        self._meet(raised)
        slots: list[Any] | None = [None] * self.world_size if self.is_coordinator else None
        try:
            dist.gather_object(encode(sent), slots, self._root, self._group)
        except RuntimeError as error:
            self._broken(error, raised)
        if slots is None:
            return None
        return [decode(data, _Sent) for data in slots]

    def _scatter(self, verdicts: list[_Verdict] | None, raised: BaseException | None) -> _Verdict:
        self._meet(raised)
        received: list[Any] = [None]
        encoded = None if verdicts is None else [encode(verdict) for verdict in verdicts]
        try:
            dist.scatter_object_list(received, encoded, self._root, self._group)
        except RuntimeError as error:
            self._broken(error, raised)
        return decode(received[0], _Verdict)

    def _meet(self, raised: BaseException | None) -> None:
        """Wait for all ranks under this operation's deadline, so that what follows is short."""
        if not self._monitored:
            return
        remaining = self._clock.remaining()
        limit = _FOREVER if remaining is None else max(remaining, 0.1)
        try:
            dist.monitored_barrier(
                self._group, timeout=timedelta(seconds=limit), wait_all_ranks=True
            )
        except RuntimeError as error:
            self._broken(error, raised)

    def _broken(self, error: RuntimeError, raised: BaseException | None) -> NoReturn:
        """A collective failed: the ranks are no longer together, and nobody can say why."""
        waited = self._clock.waited()
        missing = missing_ranks(str(error))
        if missing:
            message = describe_missing(missing, waited, [])
        else:
            reason = str(error).split("Exception raised from", 1)[0].strip().splitlines()[0]
            message = f"the ranks did not come together {waited}: {reason}"
        raise exception_of(
            [
                silent_rank(rank, describe_missing([rank], waited, []), "timeout")
                for rank in missing
            ],
            doing="",
            checkpoint=self._heading.checkpoint,
            message=message,
            kind="timeout",
            local=None if raised is None else (self.rank, raised),
            hint="make a new process group: this one is out of step",
        ) from error

    # -- the rest of the interface -------------------------------------------------------------

    def check(self) -> None:
        """Raise if this rank's deadline passed."""
        self._clock.check()

    def decide_once(self, outcome: Outcome) -> Outcome:
        """The coordinator's first proposal wins; the others learn it from the verdicts."""
        if self.is_coordinator:
            return self._propose(outcome)
        if self._decision is None:
            raise CoordinationError(
                "without a store only the coordinator knows how the save ends, and it has not "
                "said so",
                kind="store_lost",
                checkpoint=self._heading.checkpoint,
                rank=self.rank,
            )
        return self._decision

    def _propose(self, outcome: Outcome) -> Outcome:
        with self._decision_lock:
            self._decision = self._decision or outcome
            return self._decision

    def close(self) -> None:
        """Nothing is held; ``step`` may not be called any more."""
        self._closed = True


def missing_ranks(text: str) -> list[int]:
    """The ranks that gloo's monitored barrier says are missing."""
    found = re.search(r"[Rr]anks?:? ([\d, ]+?)\s*failed to pass", text)
    return sorted(int(rank) for rank in re.findall(r"\d+", found[1])) if found else []


class CollectiveSession(Session):
    """Ranks of a group with a CPU backend and no store.

    Args:
        group: the process group, or None for the default group.
    """

    def __init__(self, group: Any, info: GroupInfo, identity: RunIdentity) -> None:
        self.rank = info.rank
        self.world_size = info.world_size
        self.identity = identity
        self._group = group
        self._info = info
        self._numbers = Numbers()
        self._busy = threading.Lock()
        self._closed = False

    def begin(
        self,
        kind: OperationKind,
        checkpoint_id: str,
        *,
        deadlines: Deadlines,
        coordinator_rank: int = 0,
        number: int | None = None,
    ) -> CollectiveOperation:
        """Take the next number; see the interface."""
        if self._closed:
            raise UsageError("the session is closed")
        if not 0 <= coordinator_rank < self.world_size:
            raise UsageError(
                f"coordinator_rank is {coordinator_rank}, but the group has ranks 0 to "
                f"{self.world_size - 1}",
                checkpoint=checkpoint_id,
            )
        heading = Heading(
            number=self._numbers.given(number),
            kind=kind,
            checkpoint=checkpoint_id,
            coordinator=coordinator_rank,
        )
        return CollectiveOperation(
            heading, group=self._group, info=self._info, deadlines=deadlines, busy=self._busy
        )

    def take_number(self) -> int:
        """The next number; see the interface."""
        return self._numbers.take()

    def close(self) -> None:
        """The group belongs to the caller."""
        self._closed = True
