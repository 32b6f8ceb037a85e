"""A process that writes checkpoints while the trainer goes on.

Belongs here: ``CheckpointProcess``, the parent's side: what is sent, in which order, and a new
child in the place of a dead one. Does not belong here: the process as such (``executors.process``),
staging (``staging``), and what the child does (``process_child``).
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dcp_engine.checkpointer.checkpoint_writer import CheckpointWriter
from dcp_engine.checkpointer.parcels import ArenaNumbers, HeldState, hold_state
from dcp_engine.checkpointer.process_protocol import (
    ChildSettings,
    RequestType,
    WorkerRequest,
    WorkerResponse,
)
from dcp_engine.checkpointer.sessions import WriteTurn
from dcp_engine.checkpointer.turns import ParentTurns
from dcp_engine.checkpointer.types import STATE_DICT, RankInfo
from dcp_engine.checkpointer.utils import wrap_future
from dcp_engine.closing import Closing
from dcp_engine.coordination.failures import capture, exception_of, restore
from dcp_engine.errors import CheckpointError, CheckpointException, CoordinationError, UsageError
from dcp_engine.executors.ordered_thread import OrderedThread
from dcp_engine.executors.process import (
    WorkerError,
    WorkerProcess,
    WorkerSettings,
    dumps,
    loads,
)
from dcp_engine.staging.stagers import DefaultStager as EngineStager

__all__ = [
    "CheckpointProcess",
    "CheckpointProcessConfig",
    "RequestType",
    "WorkerRequest",
    "WorkerResponse",
]

logger = logging.getLogger(__name__)

_HANDLER = "dcp_engine.checkpointer.process_child:factory"


@dataclass
class CheckpointProcessConfig:
    """How long a checkpoint process waits for its child."""

    subprocess_init_timeout_secs: float = 30
    """Seconds until the child's writer has been made; then the child is killed."""
    subprocess_shutdown_timeout_secs: float = 60
    """Seconds that ``close`` waits for writes under way and for the writer's ``close``; then the
    child is killed."""


class CheckpointProcess(Closing):
    """Writes checkpoints in a child process. A context manager.

    The child is started at once and kept. A write that fails does not end it; one that has died
    is replaced at the next write. It ends with its parent, however that ends.

    The functions and arguments are pickled; the functions have to be importable. What they raise
    is in ``process_creation_future``, with the child's traceback.

    Ranks write together: their ``write`` calls have to come in one order. Where this process has
    ``torch.distributed``, the children commit over its store, and the first ``write`` waits for
    all ranks; else the child's writer has to know a way (see ``CheckpointWriter``).

    Args:
        rank_info: this rank among those that write together.
        config: how long to wait.
        subprocess_init_fn, subprocess_init_args: called first in the child.
        checkpoint_writer_init_fn, checkpoint_writer_init_args: make the child's writer; get
            ``rank_info`` too.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        config: CheckpointProcessConfig,
        subprocess_init_fn: Callable[..., Any],
        subprocess_init_args: tuple[Any, ...],
        checkpoint_writer_init_fn: Callable[..., CheckpointWriter],
        checkpoint_writer_init_args: dict[str, Any],
    ) -> None:
        self._rank_info = rank_info
        self._config = config
        self._init = dumps(
            ChildSettings(
                rank_info=rank_info,
                subprocess_init_fn=subprocess_init_fn,
                subprocess_init_args=tuple(subprocess_init_args),
                checkpoint_writer_init_fn=checkpoint_writer_init_fn,
                checkpoint_writer_init_args=dict(checkpoint_writer_init_args),
            )
        )
        self._turns = ParentTurns(rank_info)
        self._arenas = ArenaNumbers()
        self._stagers = (EngineStager(), EngineStager())
        self._thread = OrderedThread(f"dcp_engine-checkpoint-{rank_info.global_rank}")
        self._closed = False
        self._worker = self._start()
        self.process_creation_future: Future[None] = wrap_future(self._worker.started)
        """Done when the child has its writer; fails with what the start failed with."""
        this = weakref.ref(self)

        def close_at_exit() -> None:
            process = this()
            if process is not None:
                process.close()

        self._at_exit = close_at_exit
        atexit.register(close_at_exit)

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        return self._worker.pid if self._worker.alive else None

    def ping(self, timeout: float | None = None) -> None:
        """Return when the child answers, after the writes that are under way.

        Raises:
            WorkerError: it did not start, has died, or did not answer in ``timeout`` seconds.
        """
        self._ask(self._worker, RequestType.PING, {}, [], timeout)

    def write(
        self, state_dict: STATE_DICT | Future[STATE_DICT], path: str, **kwargs: Any
    ) -> Future[None]:
        """Have the child write ``state_dict``, after what it was given before.

        A ``StagedStateDict`` of this layer's stager crosses without a copy, and its memory is
        held until it is written. Everything else is staged first, before this returns, unless it
        is a future.

        Args:
            state_dict: or the future of one.
            path: path or URL of the checkpoint, the same on all ranks.
            kwargs: for the writer's ``write``.

        Returns:
            Done when the checkpoint is committed. Fails with what the writer, the staging or the
            start of the child failed with, or ``CheckpointException`` with kind ``worker_died``.

        Raises:
            UsageError: this is closed, or ``kwargs`` cannot be pickled.
            UnsupportedStateError, StagingError: it cannot be staged. The other ranks are told.
        """
        self._refuse_if_closed()
        turn = self._turns.take()
        try:
            dumps(kwargs)
            held = hold_state(state_dict, self._stagers, self._refuse_if_closed)
        except BaseException as error:
            failure = error
            self._thread.submit(lambda: self._give_up(turn, path, failure))
            raise
        try:
            return wrap_future(self._thread.submit(lambda: self._write(turn, path, held, kwargs)))
        except BaseException:
            held.release()
            raise

    def close(self) -> None:
        """Wait for the writes under way, close the writer, end the child; kill it when
        ``subprocess_shutdown_timeout_secs`` have passed. May be called twice.

        Raises what the writer's ``close`` raised.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        end = time.monotonic() + self._config.subprocess_shutdown_timeout_secs
        try:
            if self._thread.close(_left(end)) and self._worker.alive:
                self._close_writer(end)
        finally:
            self._worker.close(_left(end))
            self._thread.close(self._config.subprocess_shutdown_timeout_secs)
            self._turns.close()
            for stager in self._stagers:
                stager.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError("the checkpoint process is closed", hint="make a new one")

    # -- the child -----------------------------------------------------------------------------

    def _start(self) -> WorkerProcess:
        rank = self._rank_info.global_rank
        worker = WorkerProcess(
            WorkerSettings(
                handler=_HANDLER,
                init=self._init,
                name=f"dcp_engine-checkpoint-{rank}",
                rank=rank,
                start_timeout=self._config.subprocess_init_timeout_secs,
                shutdown_timeout=self._config.subprocess_shutdown_timeout_secs,
            )
        )
        worker.start()
        return worker

    def _living(self) -> WorkerProcess:
        """The child, or a new one in its place. Called on the thread."""
        if not self._worker.alive and not self._closed:
            logger.info("%s is gone; a new one takes its place", self._worker)
            self._worker.close(0)
            self._arenas.forget_sent()
            self._worker = self._start()
            self.process_creation_future = wrap_future(self._worker.started)
        return self._worker

    def _answering(self) -> WorkerProcess:
        """The child, when it has answered: one that died while nobody looked must not cost a
        write."""
        worker = self._living()
        try:
            self._ask(worker, RequestType.PING, {}, [])
        except WorkerError as error:
            if error.kind != "worker_died" or self._closed:
                raise
            worker.close(0)
            worker = self._living()
        return worker

    def _ask(
        self,
        worker: WorkerProcess,
        request_type: RequestType,
        payload: dict[str, Any],
        descriptors: list[int],
        timeout: float | None = None,
    ) -> None:
        body = dumps(WorkerRequest(request_type=request_type, payload=payload))
        answer: WorkerResponse = loads(
            worker.call(request_type.value, body, descriptors=descriptors, timeout=timeout)
        )
        if not (answer.success and answer.request_type is request_type):
            raise CoordinationError(f"{worker} answered {answer}", kind="out_of_step")

    def _close_writer(self, end: float) -> None:
        try:
            self._ask(self._worker, RequestType.TERMINATE_PROCESS, {}, [], _left(end))
        except WorkerError:
            # It died, hangs, or never came up; whoever needed it was told by a future.
            logger.warning("the checkpoint process did not close its writer", exc_info=True)

    # -- on the thread -------------------------------------------------------------------------

    def _write(self, turn: WriteTurn, path: str, held: HeldState, kwargs: dict[str, Any]) -> None:
        try:
            try:
                worker = self._answering()
            except WorkerError as error:
                raise self._lost(turn, path, error) from error
            except CheckpointError as error:  # closed, while this write waited
                self._turns.report(turn, error)
                raise
            try:
                state, descriptors = held.pack(self._arenas)
            except BaseException as error:
                self._give_up(turn, path, error)
                raise
            payload = {"path": path, "state": state, "kwargs": kwargs, "turn": turn}
            try:
                self._ask(worker, RequestType.WRITE_CHECKPOINT, payload, descriptors)
            except WorkerError as error:
                raise self._lost(turn, path, error) from error
            self._arenas.sent(state.arena)
        finally:
            held.release()

    def _give_up(self, turn: WriteTurn, path: str, error: BaseException) -> None:
        """This rank has nothing to write, because of ``error``; tell the others."""
        if self._rank_info.global_world_size == 1:
            return
        payload = {"path": path, "state": _portable(error), "kwargs": {}, "turn": turn}
        try:
            self._ask(self._answering(), RequestType.WRITE_CHECKPOINT, payload, [])
        except WorkerError as lost:
            self._lost(turn, path, lost)
        except BaseException as raised:
            # What it was sent, or another rank's failure of the same write.
            logger.debug("write %d to %s was given up: %s", turn.number, path, raised)

    def _lost(self, turn: WriteTurn, path: str, error: WorkerError) -> CheckpointError:
        """The child did not live to answer: tell the others, and say what that means here."""
        self._worker.close(0)
        outcome = self._turns.report(turn, error)
        if error.kind == "worker_start":
            return error
        if not self._closed:
            self._living()  # so that it is there in time
        rank = self._rank_info.global_rank
        failure = exception_of(
            [capture(rank, error)],
            doing="write by the checkpoint process",
            checkpoint=path,
            local=(rank, error),
            hint="the next write starts a new one; whether this one was committed the manifest "
            "tells: load, and look at the values",
        )
        if outcome != "commit":
            return failure
        return CheckpointException(
            f"whether write {turn.number} was committed is not known: {error.message}",
            failure.failures,
            kind="commit_in_doubt",
            checkpoint=path,
            hint="nothing was deleted; the next save, load or prune decides by the manifest",
        )


def _portable(error: BaseException) -> BaseException:
    """``error`` as it can be pickled."""
    return restore(capture(0, error))[0]


def _left(end: float) -> float:
    return max(end - time.monotonic(), 0.0)
