"""Asynchronous saves of one engine: in order, with the memory and the worker they share.

Belongs here: what happens on the calling thread, the order of saves, failures that nobody looked
at, and the end. Does not belong here: how a save runs (``in_thread``, ``in_process``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any, Literal

from dcp_engine.async_saver.custom_copies import CustomCopies
from dcp_engine.async_saver.earlier_failures import log_consequences, next_unseen, told_to_others
from dcp_engine.async_saver.in_process import Parcel, ProcessSaver
from dcp_engine.async_saver.in_thread import THREAD_NICE, save_here
from dcp_engine.async_saver.job import SaveJob
from dcp_engine.async_saver.report_failure import report_failure
from dcp_engine.async_saver.response import AsyncCheckpointerType, AsyncSaveResponse, Progress
from dcp_engine.async_saver.snapshot import (
    ColumnSnapshot,
    CustomSnapshot,
    DirectSnapshot,
    Snapshot,
    StateSnapshot,
    take_snapshot,
    uses_arenas,
)
from dcp_engine.async_saver.staging_time import await_staging, deadline_of_staging
from dcp_engine.errors import StagingError, UsageError
from dcp_engine.executors.ordered_thread import OrderedThread
from dcp_engine.executors.process.settings import DEFAULT_NICE
from dcp_engine.metadata import Metadata
from dcp_engine.planner import SavePlanner
from dcp_engine.saver.save import checkpoint_name, content_of, require_planner, require_writer
from dcp_engine.staging.arena_stager import no_check
from dcp_engine.staging.stagers import AsyncStager, BlockingAsyncStager, DefaultStager

__all__ = ["AsyncSaver", "LowMemory"]

logger = logging.getLogger(__name__)

LowMemory = Literal["error", "sync"]


class AsyncSaver:
    """What asynchronous saves of one engine share.

    Args:
        rank: of this process, for names.
        max_pending: saves that may hold staging memory at the same time.
        nice: by how much workers, and threads that only write, give way to training; None for
            what suits each.

    ``save`` is to be called from one thread at a time, on all ranks in one order.
    """

    def __init__(self, rank: int, *, max_pending: int = 1, nice: int | None = None) -> None:
        self._stager = DefaultStager(arenas=max_pending)
        self._second_stager: DefaultStager | None = None
        """For the thread: what a custom stager has staged is copied once more for a worker. Not
        into the first one's arenas, which saves further back in the line may hold."""
        self._thread = OrderedThread("dcp_engine-async-saves")
        self._process = ProcessSaver(rank, nice=DEFAULT_NICE if nice is None else nice)
        self._thread_nice = THREAD_NICE if nice is None else nice
        self._responses: list[AsyncSaveResponse] = []
        self._custom_copies = CustomCopies(max_pending)
        self._reported: set[Future[None]] = set()
        """Stagings whose end ``wait_for_staging`` has told."""
        self._closed = False

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker, while there is one."""
        return self._process.pid

    @property
    def bytes_sent(self) -> int:
        """Of the last request to the worker."""
        return self._process.bytes_sent

    def save(
        self,
        job: SaveJob,
        state_dict: Mapping[str, Any],
        *,
        planner: SavePlanner | None,
        kind: AsyncCheckpointerType,
        stager: AsyncStager | None,
        background_staging: bool,
        on_low_memory: LowMemory,
    ) -> AsyncSaveResponse:
        """Copy ``state_dict`` and begin to save the copy; see ``dcp_engine.async_save``."""
        self._refuse_if_closed()
        for_worker = kind is AsyncCheckpointerType.PROCESS
        earlier = self._failed_before()
        if earlier is not None:
            told = told_to_others(earlier)
            self._thread.submit(lambda: _tell_others(job, told))
            raise earlier
        try:
            job = job.as_of_now()
            require_writer(job.writer)
            require_planner(planner)
            if for_worker:
                job.session.handle()  # whether a worker can reach the session
            snapshot = self._take(
                job,
                state_dict,
                planner=planner,
                stager=stager,
                background=background_staging,
                for_worker=for_worker,
                on_low_memory=on_low_memory,
            )
            if isinstance(snapshot, DirectSnapshot):
                self.refuse_in_callback("a save for whose copy there is no memory")
            parcel = self._packed(job, snapshot) if for_worker else None
        except BaseException as error:
            failed = error
            self._thread.submit(lambda: _tell_others(job, failed))
            raise
        response = AsyncSaveResponse(snapshot.completion, snapshot.progress)
        order = _Order(
            job=job,
            snapshot=snapshot,
            parcel=parcel,
            for_worker=for_worker,
            on_low_memory=on_low_memory,
        )
        try:
            self._thread.submit(lambda: self._run(order, response))
        except BaseException:
            snapshot.release()  # closed meanwhile, or the interpreter has no thread left to give
            raise
        self._responses.append(response)
        if stager is not None and isinstance(snapshot, CustomSnapshot):
            self._custom_copies.add(stager, response)
        if isinstance(snapshot, DirectSnapshot):
            wait_for([response])
        return response

    def warmup(
        self,
        state_dict: Mapping[str, Any],
        *,
        kind: AsyncCheckpointerType,
    ) -> None:
        """Have staging memory for ``state_dict``, and a worker that maps it."""
        self._refuse_if_closed()
        if kind is AsyncCheckpointerType.PROCESS:
            self.refuse_in_callback("the warm-up of a worker")
            self._process.start()
        self._stager.warmup(state_dict)
        if kind is AsyncCheckpointerType.PROCESS:
            self._thread.submit(self._touch).result()

    def wait_for_staging(self, timeout: float | None = None) -> None:
        """Return when no copy is under way; raise what one failed with, or ``StagingError`` with
        kind ``timeout``."""
        stagings = [response.staging_completion for response in self._responses]
        done, missing = wait_for(stagings, timeout)
        if missing:
            raise StagingError(
                f"staging took longer than {timeout} s", kind="timeout", hint="wait longer"
            )
        # Once: a step that cannot be repeated must not fail for what another one was told.
        new = [staging for staging in done if staging not in self._reported]
        self._reported = set(stagings) & (self._reported | done)
        for staging in new:
            staging.result()

    def clear_plan_cache(self) -> None:
        """Forget the worker's plans."""
        self._process.forget_plans()

    def drain(self, timeout: float | None) -> bool:
        """Wait for pending saves; whether there are none left after ``timeout`` seconds."""
        return self._thread.wait_idle(timeout)

    def close(self, timeout: float | None) -> BaseException | None:
        """Wait for pending saves, then release memory and worker. Any number of times, but not in a
        callback of one of them.

        Args:
            timeout: seconds to wait; what is pending then fails, or is left to its thread.
        Returns:
            The first failure that nobody has looked at; the others are logged.
        """
        self._closed = True
        drained = self._thread.close(timeout)
        if not drained:
            logger.error(
                "%d asynchronous saves were not finished after %s s",
                self._thread.pending(),
                timeout,
            )
        self._process.close(None if drained else 0.0)
        if not drained:
            # Its worker is gone: a save by a process ends now. One by a thread may go on.
            drained = self._thread.close(_LAST_PATIENCE)
        if drained:
            for stager in (self._stager, self._second_stager):
                if stager is not None:
                    stager.close()
        failure = next_unseen(self._responses)
        while (another := next_unseen(self._responses)) is not None:
            logger.error("another asynchronous save failed", exc_info=another)
        self._responses = [response for response in self._responses if not response.done()]
        return failure

    def refuse_in_callback(self, what: str) -> None:
        """Raise ``UsageError`` on the thread of the saves, on which callbacks of their futures run:
        ``what`` would wait for that thread, and so for itself."""
        if self._thread.is_current():
            raise UsageError(
                f"{what} waits for the asynchronous saves, and cannot do so in a callback of one, "
                "for which they wait",
                hint="leave it to another thread, for instance the one that called async_save",
            )

    # -- the calling thread --------------------------------------------------------------------

    def _take(
        self,
        job: SaveJob,
        state_dict: Mapping[str, Any],
        *,
        planner: SavePlanner | None,
        stager: AsyncStager | None,
        background: bool,
        for_worker: bool,
        on_low_memory: LowMemory,
    ) -> Snapshot:
        check = deadline_of_staging(job)
        if stager is not None and not uses_arenas(stager):
            self._custom_copies.await_turn(stager, check)
        try:
            return take_snapshot(
                job,
                state_dict,
                planner=planner,
                stager=self._stager if stager is None else stager,
                background=background,
                for_worker=for_worker,
                check=check,
            )
        except StagingError as error:
            # The state itself may hold what a stager of another origin leaves out.
            plain = stager is None or type(stager) in (DefaultStager, BlockingAsyncStager)
            if error.kind != "out_of_memory" or on_low_memory != "sync" or not plain:
                raise
            where = checkpoint_name(job.checkpoint_id, job.writer)
            logger.warning("saving %s while training waits: %s", where, error.message)
            return DirectSnapshot(
                lambda: content_of(
                    state_dict,
                    writer=job.writer,
                    planner=planner,
                    group=job.group,
                    options=job.options,
                )
            )

    def _packed(self, job: SaveJob, snapshot: Snapshot) -> Parcel | None:
        """What the worker is going to be sent, if it is known yet. Has a worker from here on, not
        before: a new one takes a processor for seconds, which the copy needs now."""
        if isinstance(snapshot, DirectSnapshot):
            return None
        try:
            self._process.start()
            if not isinstance(snapshot, ColumnSnapshot | StateSnapshot):
                return None
            return self._process.pack(job, snapshot)
        except BaseException:
            snapshot.release()
            raise

    def _failed_before(self) -> BaseException | None:
        """A failure that nobody has looked at, to be raised now."""
        log_consequences(self._responses)
        error = next_unseen(self._responses)
        self._responses = [r for r in self._responses if not r.done() or r.unseen_failure()]
        return error

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError("this engine is closed", hint="make a new dcp_engine.Engine")

    # -- the thread of the saves ---------------------------------------------------------------

    def _run(self, order: _Order, response: AsyncSaveResponse) -> None:
        try:
            metadata = self._save(order, response.tell)
        except BaseException as error:
            order.snapshot.release()
            response.set_exception(error)
        else:
            order.snapshot.release()
            response.set_result(metadata)

    def _save(self, order: _Order, tell: Callable[[Progress], None]) -> Metadata:
        job, snapshot, parcel = order.job, order.snapshot, order.parcel
        try:
            await_staging(job, snapshot)
            if order.for_worker and isinstance(snapshot, CustomSnapshot):
                parcel = self._restaged(order, snapshot)
        except BaseException as error:
            report_failure(job, error, "staging")
        if parcel is not None:
            try:
                return self._process.save(job, parcel, tell)
            finally:
                parcel.snapshot.release()
        return save_here(
            job,
            snapshot.content(),
            tell=tell,
            total=snapshot.progress().bytes_total,
            beside_workers=order.for_worker and job.options.use_collectives,
            beside_training=not isinstance(snapshot, DirectSnapshot),
            nice=self._thread_nice,
        )

    def _touch(self) -> None:
        for arena in self._stager.arenas.free_arenas():
            self._process.touch(arena, arena.present())

    def _restaged(self, order: _Order, custom: CustomSnapshot) -> Parcel | None:
        """A worker reads the engine's staging memory only: once more, off the caller's path. None
        where there is no memory for that, and this process may save what there is."""
        if self._second_stager is None:
            self._second_stager = DefaultStager()
        try:
            snapshot = take_snapshot(
                order.job,
                custom.state_dict(),
                planner=custom.planner,
                stager=self._second_stager,
                background=False,
                for_worker=True,
                check=no_check,
            )
        except StagingError as error:
            if error.kind != "out_of_memory" or order.on_low_memory != "sync":
                raise
            where = checkpoint_name(order.job.checkpoint_id, order.job.writer)
            logger.warning("saving %s without the worker: %s", where, error.message)
            return None
        return self._packed(order.job, snapshot)


_LAST_PATIENCE = 5.0
"""Seconds for a save whose worker was ended, to say so."""


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What the thread of the saves has to do."""

    job: SaveJob
    snapshot: Snapshot
    parcel: Parcel | None
    for_worker: bool
    on_low_memory: LowMemory


def _tell_others(job: SaveJob, error: BaseException) -> None:
    """The caller has raised already; what the other ranks say is of no interest to it."""
    try:
        report_failure(job, error, "agree")
    except Exception:
        logger.debug("a save that could not begin failed on all ranks", exc_info=True)
