"""One numbered save or load over a store, as the calling thread sees it.

Belongs here: the order of a step, and turning verdicts into exceptions. Does not belong here:
messages and waiting, which the store thread does (``store_thread``, ``coordinator_role``,
``participant_role``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import NoReturn

from dcp_engine.coordination.answers import checked_answers
from dcp_engine.coordination.clock import OperationClock
from dcp_engine.coordination.coordinator_role import CoordinatorRole
from dcp_engine.coordination.failures import (
    FailureRecord,
    capture,
    exception_of,
    is_consequence,
    raised_by_exit,
)
from dcp_engine.coordination.interface import Deadlines, Decision, Operation, Outcome
from dcp_engine.coordination.keys import OperationKeys
from dcp_engine.coordination.messages import FailureVerdict, Heading
from dcp_engine.coordination.participant_role import ParticipantRole
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.role import Failed, Granted, Reply, RoleContext, announce_failure
from dcp_engine.coordination.store_client import AtLimit, StoreClient
from dcp_engine.coordination.store_thread import StoreThread
from dcp_engine.errors import CheckpointError, CheckpointException, CoordinationError, UsageError

__all__ = ["StoreOperation"]

_Role = CoordinatorRole | ParticipantRole


class StoreOperation(Operation):
    """Made by ``StoreSession.begin``.

    Args:
        connect: lends a client to this operation; called at the first step.
        give_back: takes the client back if it is idle and its connection lives.
        drop: takes a client back whose connection is not to be kept.
    """

    def __init__(
        self,
        heading: Heading,
        *,
        rank: int,
        world_size: int,
        prefix: str,
        deadlines: Deadlines,
        rhythm: Rhythm,
        connect: Callable[[], StoreClient],
        give_back: Callable[[StoreClient], None],
        drop: Callable[[StoreClient], None],
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.coordinator_rank = heading.coordinator
        self.number = heading.number
        self._heading = heading
        self._keys = OperationKeys(prefix)
        self._rhythm = rhythm
        self._connect = connect
        self._give_back = give_back
        self._drop = drop
        self._clock = OperationClock(deadlines, heading.kind, heading.checkpoint)
        self._thread: StoreThread[_Role] | None = None
        self._thread_lock = threading.Lock()
        self._step = -1
        self._failure: CheckpointException | None = None
        self._closed = False
        self._thread_waits = False
        """The store thread is in a wait that nobody is interested in any more."""

    # -- the interface -------------------------------------------------------------------------

    def step(
        self,
        phase: str,
        local: Callable[[], bytes],
        decide: Callable[[list[bytes]], Decision],
        *,
        decide_phase: str | None = None,
        regardless: bool = False,
    ) -> tuple[bytes, bytes]:
        """Run ``local`` everywhere and ``decide`` on the coordinator; see the interface."""
        self._refuse_if_closed()
        if self._failure is not None:
            raise self._failure
        self._step += 1
        self._clock.enter(phase)
        step = self._step
        second = decide_phase or phase
        try:
            self._started().ask(lambda role: role.begin_step(step, phase, second))
            try:
                if not regardless:
                    self.check()
                payload = bytes(local())
            except BaseException as error:
                self._fail(phase, error)
            reply = self._await(lambda role, future: role.report(payload, phase, future))
            granted = self._granted(reply, phase, None)
            if granted.reports is None:
                return granted.common, granted.answer
            try:
                decision = decide(granted.reports)
                answers = checked_answers(decision, self.world_size)
            except BaseException as error:
                self._fail(second, error)
            common = bytes(decision.common)
            reply = self._await(
                lambda role, future: _coordinator(role).conclude(common, answers, future)
            )
            granted = self._granted(reply, second, None)
            return granted.common, granted.answer
        except CoordinationError as error:
            self._lost(error, None)
        except CheckpointException as error:
            self._failure = error
            raise
        except BaseException as error:
            self._abandon(error)
            raise

    def check(self) -> None:
        """Raise if another rank failed, the store is lost, or a deadline passed."""
        thread = self._thread
        if thread is not None:
            role = thread.role
            if role is not None and role.alarm.is_set():
                raise CoordinationError(
                    f'{self._heading.kind} stopped in phase "{self._clock.phase}": '
                    "another rank failed",
                    kind="interrupted",
                    checkpoint=self._heading.checkpoint,
                    rank=self.rank,
                )
            thread.raise_if_stuck()
        self._clock.check()

    def decide_once(self, outcome: Outcome) -> Outcome:
        """Propose an outcome; the first proposal of any rank wins."""
        self._refuse_if_closed()
        return self._started().ask(lambda role: role.decide_once(outcome))

    def close(self) -> None:
        """Stop heartbeats, remove keys, hand the connection back."""
        if self._closed:
            return
        self._closed = True
        thread = self._thread
        if thread is None:
            return
        if self._thread_waits:
            thread.stop(0)  # it ends when its wait does; its connection is not used again
            return
        try:
            thread.ask(lambda role: role.depart())
        except CheckpointError:
            # The store is lost, and its keys with it; whoever needed it has been told.
            thread.stop(0)
            return
        if thread.stop(self._rhythm.slack) and thread.client is not None:
            self._give_back(thread.client)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """A rank that leaves by an error of its own lets the others know."""
        if exc is not None and exc is not self._failure and not self._closed:
            self._abandon(exc)
        self.close()

    # -- failing -------------------------------------------------------------------------------

    def _fail(self, phase: str, error: BaseException) -> NoReturn:
        """``local`` or ``decide`` raised: tell the others, wait for the verdict, raise it."""
        record = self._record(error)
        if raised_by_exit(error):
            raise error  # reported by the caller, which waits for nobody
        try:
            reply = self._await(lambda role, future: role.fail(record, future))
        except CoordinationError as lost:
            self._lost(lost, error)
        self._granted(reply, phase, error)
        raise CoordinationError(  # a verdict of success cannot follow a failure
            "the operation went on after a failure", kind="out_of_step", rank=self.rank
        ) from error

    def _granted(self, reply: Reply, phase: str, error: BaseException | None) -> Granted:
        if isinstance(reply, Failed):
            raise self._exception(reply.verdict, phase, error) from error
        return reply

    def _exception(
        self, verdict: FailureVerdict, phase: str, error: BaseException | None
    ) -> CheckpointException:
        return exception_of(
            verdict.records,
            doing=f'{self._heading.kind} in phase "{verdict.phase or phase}"',
            checkpoint=self._heading.checkpoint,
            message=verdict.message,
            kind=verdict.kind,
            local=None if error is None else (self.rank, error),
        )

    def _lost(self, lost: CoordinationError, error: BaseException | None) -> NoReturn:
        """The store is gone: no verdict will come, every rank finds out for itself."""
        if isinstance(error, CoordinationError) and error.kind in ("store_lost", "interrupted"):
            error = None  # found out while it worked; that is no failure of this rank's own
        self._failure = exception_of(
            [],
            doing=f"{self._heading.kind}",
            checkpoint=self._heading.checkpoint,
            message=f'{self._heading.kind} in phase "{self._clock.phase}": {lost.message}',
            kind=lost.kind,
            local=None if error is None else (self.rank, error),
            hint=lost.hint,
        )
        raise self._failure from lost

    def _abandon(self, error: BaseException) -> None:
        """Let the others know that this rank leaves, without waiting for any of them."""
        client = self._thread.client if self._thread is not None else None
        if client is not None and client.lost is not None:
            return
        record = self._record(error)
        done: Future[None] = Future()

        def abandon(role: _Role) -> None:
            role.abandon(record)
            done.set_result(None)

        thread = self._started()
        thread.tell(abandon, done.set_exception)
        try:
            thread.result(done, limit=self._rhythm.slack)
        except TimeoutError:
            self._thread_waits = True
            # The store thread waits for a coordinator that has not begun: use another connection.
            if self.rank != self.coordinator_rank:
                self._announce_apart(record)
        except CheckpointError:
            return  # the store is lost; `error`, which the caller raises, is what matters here

    def _announce_apart(self, record: FailureRecord) -> None:
        done = threading.Event()

        def announce() -> None:
            try:
                self._apart(lambda client: announce_failure(client, self._keys, record))
            finally:
                done.set()

        threading.Thread(target=announce, name="dcp_engine-abandon", daemon=True).start()
        done.wait(self._rhythm.slack)

    def _apart(self, call: AtLimit) -> None:
        """Say something over another connection, while the store thread waits."""
        client = self._another()
        try:
            call(client)
        finally:
            self._drop(client)

    def _another(self) -> StoreClient:
        client = self._connect()
        client.patience = self._patience()
        return client

    def _record(self, error: BaseException) -> FailureRecord:
        thread = self._thread
        role = thread.role if thread is not None else None
        alarmed = role is not None and role.alarm.is_set()
        return capture(
            self.rank, error, skip_frames=1, consequence=alarmed and is_consequence(error)
        )

    # -- the store thread ----------------------------------------------------------------------

    def _started(self) -> StoreThread[_Role]:
        with self._thread_lock:
            if self._thread is None:
                self._thread = StoreThread(
                    self._connect,
                    self._assume,
                    self._another,
                    self._drop,
                    name=f"dcp_engine-{self._heading.kind}-{self.number}",
                    connect_limit=self._patience(),
                    slack=max(self._rhythm.slack, self._patience() / 4),
                )
            return self._thread

    def _patience(self) -> float:
        stall = self._clock.deadlines.stall_timeout
        return max(self._rhythm.slack, min(stall, 60.0) if stall is not None else 60.0)

    def _assume(self, client: StoreClient) -> _Role:
        client.patience = self._patience()
        context = RoleContext(
            client=client,
            keys=self._keys,
            heading=self._heading,
            rank=self.rank,
            world_size=self.world_size,
            rhythm=self._rhythm,
            clock=self._clock,
        )
        return CoordinatorRole(context) if self.is_coordinator else ParticipantRole(context)

    def _await(self, call: Callable[[_Role, Future[Reply]], None]) -> Reply:
        thread = self._started()
        reply: Future[Reply] = Future()
        thread.tell(lambda role: call(role, reply), reply.set_exception)
        return thread.result(reply)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError(f"{self._heading.describe()} is closed")


def _coordinator(role: _Role) -> CoordinatorRole:
    if not isinstance(role, CoordinatorRole):
        raise UsageError("only the coordinator decides")
    return role
