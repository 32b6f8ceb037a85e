"""``Engine``: owns the session with the other ranks, and runs saves and loads over it."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import EllipsisType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from dcp_engine.async_saver import AsyncCheckpointerType, AsyncSaver, AsyncSaveResponse, SaveJob
from dcp_engine.async_saver.saver import LowMemory
from dcp_engine.coordination.collective import CollectiveSession
from dcp_engine.coordination.interface import Session
from dcp_engine.engine.arguments import (
    CheckpointId,
    TimeLimits,
    Timeout,
    checkpointer_type,
    required_place,
    text_of,
)
from dcp_engine.engine.lookup import agree_on_latest
from dcp_engine.engine.save_ids import SaveIds
from dcp_engine.engine.sessions import Place, Sessions
from dcp_engine.errors import CheckpointError, StorageError, UsageError
from dcp_engine.executors.main_end import call_at_main_end
from dcp_engine.executors.process.settings import MAX_NICE
from dcp_engine.loader import LoadOptions, LoadReport, load
from dcp_engine.loader.options import LOAD_PHASES, SHARED_READS, PerRankPolicy, SharedReads
from dcp_engine.loader.verify import VerifyLevel
from dcp_engine.metadata import STATE_DICT_TYPE, Metadata
from dcp_engine.planner import LoadPlanner, SavePlanner
from dcp_engine.registry import BackendRegistry, Unavailable
from dcp_engine.saver import PlanMemory, SaveOptions, save
from dcp_engine.saver.options import ASYNC_SAVE_PHASES, SAVE_PHASES, ExtraContent
from dcp_engine.staging.hooks import install_staging_hook
from dcp_engine.staging.stagers import AsyncStager
from dcp_engine.staging.writer_stager import stager_of
from dcp_engine.storage import StorageReader, StorageWriter

__all__ = ["Engine"]

logger = logging.getLogger(__name__)


class Engine:
    """Saves and loads over one process group, and what they share between calls.

    Args:
        process_group: the ranks that save and load together; None for the default group, or for
            this process alone where torch.distributed is not initialised.
        timeout: default for the operations, seconds or timedelta; None waits forever.
        stall_timeout: default for the operations: seconds without a heartbeat of a rank.
        connect_timeout: seconds to wait for the other ranks when the session opens.
        max_pending: asynchronous saves that may hold staging memory at the same time; each costs
            the size of the state.
        drain_at_exit: whether the end of the program waits for pending asynchronous saves. If not,
            they are given up, and that is logged.
        drain_timeout: seconds that it, and ``close``, wait for them.
        nice: 0 to 19, by how much asynchronous saves give way to training on busy processors: added
            to the nice value of the worker process (None: 10), and, on Linux, of the thread that
            digests and writes where a save by a thread goes to a file system (None: 5).

    Making one imports the storage backend of local paths, so that the first save does not wait for
    that. The session with the other ranks opens at the first operation that needs it, which must be
    the same one on all ranks. A context manager; ``close`` may be called twice. It belongs to the
    process that uses it first: a fork of that one has to make its own, and the default engine does
    so by itself.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        timeout: Timeout = 1800.0,
        stall_timeout: Timeout = 60.0,
        connect_timeout: float = 300.0,
        max_pending: int = 1,
        drain_at_exit: bool = True,
        drain_timeout: float | None = 600.0,
        nice: int | None = None,
    ) -> None:
        if nice is not None and not 0 <= nice <= MAX_NICE:
            raise UsageError(f"nice is {nice}", hint=f"it is a number from 0 to {MAX_NICE}")
        self._limits = TimeLimits(timeout=timeout, stall_timeout=stall_timeout)
        self._sessions = Sessions(process_group, connect_timeout=connect_timeout)
        self._save_ids = SaveIds()
        self._max_pending = max_pending
        self._drain_at_exit = drain_at_exit
        self._drain_timeout = drain_timeout
        self._nice = nice
        self._async: AsyncSaver | None = None
        self._patience_is_over = False
        """At the end of the program ``drain_timeout`` was not enough."""
        self._registry = BackendRegistry()
        with suppress(CheckpointError):  # whoever needs it will be told
            self._registry.backend(os.curdir)
        self._plans = PlanMemory()
        self._alone_plans = PlanMemory()

    def save(
        self,
        state_dict: STATE_DICT_TYPE,
        *,
        checkpoint_id: CheckpointId = None,
        storage_writer: StorageWriter | None = None,
        planner: SavePlanner | None = None,
        no_dist: bool = False,
        use_collectives: bool = True,
        timeout: Timeout | EllipsisType = ...,
        stall_timeout: Timeout | EllipsisType = ...,
        phase_timeouts: Mapping[str, float] | None = None,
        coordinator_rank: int = 0,
        extra_files: Mapping[str, ExtraContent] | None = None,
        user_metadata: Mapping[str, Any] | None = None,
        save_id: str | None = None,
        keep_replaced: bool = False,
        strict_replicas: bool = False,
    ) -> Metadata:
        """See :func:`dcp_engine.save`."""
        place = self._sessions.place(no_dist)
        writer = self._writer(checkpoint_id, storage_writer)
        options = SaveOptions(
            deadlines=self._limits.deadlines(timeout, stall_timeout, phase_timeouts, SAVE_PHASES),
            coordinator_rank=coordinator_rank,
            use_collectives=use_collectives,
            extra_files=extra_files or {},
            user_metadata=user_metadata or {},
            save_id=self._save_ids.choose(place, use_collectives=use_collectives, given=save_id),
            keep_replaced=keep_replaced,
            strict_replicas=strict_replicas,
        )
        return save(
            self._session(place, no_dist, options, checkpoint_id),
            state_dict,
            checkpoint_id=text_of(checkpoint_id),
            writer=writer,
            planner=planner,
            group=place.group,
            world_size=place.world_size,
            memory=self._alone_plans if no_dist else self._plans,
            options=options,
        )

    def async_save(
        self,
        state_dict: STATE_DICT_TYPE,
        *,
        checkpoint_id: CheckpointId = None,
        storage_writer: StorageWriter | None = None,
        planner: SavePlanner | None = None,
        async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
        async_stager: AsyncStager | None = None,
        no_dist: bool = False,
        use_collectives: bool = True,
        background_staging: bool = False,
        on_low_memory: LowMemory = "error",
        timeout: Timeout | EllipsisType = ...,
        stall_timeout: Timeout | EllipsisType = ...,
        phase_timeouts: Mapping[str, float] | None = None,
        coordinator_rank: int = 0,
        extra_files: Mapping[str, ExtraContent] | None = None,
        user_metadata: Mapping[str, Any] | None = None,
        save_id: str | None = None,
        keep_replaced: bool = False,
        strict_replicas: bool = False,
    ) -> AsyncSaveResponse:
        """See :func:`dcp_engine.async_save`."""
        if on_low_memory not in ("error", "sync"):
            raise UsageError(f"on_low_memory is {on_low_memory!r}", hint="it is 'error' or 'sync'")
        kind = checkpointer_type(async_checkpointer_type)
        place = self._sessions.place(no_dist)
        writer = self._writer(checkpoint_id, storage_writer)
        if async_stager is None:
            async_stager = stager_of(writer)
        options = SaveOptions(
            deadlines=self._limits.deadlines(
                timeout, stall_timeout, phase_timeouts, ASYNC_SAVE_PHASES
            ),
            coordinator_rank=coordinator_rank,
            use_collectives=use_collectives,
            extra_files=extra_files or {},
            user_metadata=user_metadata or {},
            save_id=self._save_ids.choose(place, use_collectives=use_collectives, given=save_id),
            keep_replaced=keep_replaced,
            strict_replicas=strict_replicas,
        )
        session = self._session(place, no_dist, options, checkpoint_id)
        if isinstance(session, CollectiveSession):
            raise UsageError(
                "an asynchronous save needs a store: over the process group its messages would "
                "mix with those of training",
                hint="initialize the process group with a TCPStore or a FileStore, or use save",
            )
        job = SaveJob(
            session=session,
            number=session.take_number(),
            checkpoint_id=text_of(checkpoint_id),
            writer=writer,
            group=place.group,
            world_size=place.world_size,
            memory=self._alone_plans if no_dist else self._plans,
            options=options,
        )
        return self._async_saver().save(
            job,
            state_dict,
            planner=planner,
            kind=kind,
            stager=async_stager,
            background_staging=background_staging,
            on_low_memory=on_low_memory,
        )

    def warmup(
        self,
        state_dict: STATE_DICT_TYPE,
        *,
        checkpoint_id: CheckpointId = None,
        async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.PROCESS,
    ) -> None:
        """Make ready for asynchronous saves of ``state_dict``, so that the first costs training
        no more than the later ones: spawn the worker, size and touch memory for one copy, import
        the storage backend. Every rank that will save calls it; it says nothing to the other ranks
        but to open the session.

        Args:
            state_dict: of the size and shape of what will be saved.
            checkpoint_id: a place of the kind that will be saved to; by default a local path.
            async_checkpointer_type: who will save.
        Raises:
            StagingError: too little memory (kind ``out_of_memory``).
        """
        kind = checkpointer_type(async_checkpointer_type)
        self._sessions.refuse_in_fork()
        self._registry.backend(os.curdir if checkpoint_id is None else checkpoint_id)
        self._sessions.get(no_dist=False)
        self._async_saver().warmup(state_dict, kind=kind)

    def wait_for_staging(self, timeout: float | None = None) -> None:
        """Return when no asynchronous save reads the state any more; to be called before the
        first write after ``async_save(background_staging=True)``.

        Raises:
            StagingError: kind ``timeout`` after ``timeout`` seconds; else what staging failed with.
        """
        self._sessions.refuse_in_fork()
        if self._async is not None:
            self._async.wait_for_staging(timeout)

    def install_staging_hook(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Have every ``optimizer.step()`` call ``wait_for_staging`` first; returns a handle whose
        ``remove()`` takes the hook away."""
        return install_staging_hook(optimizer, self.wait_for_staging)

    def load(
        self,
        state_dict: dict[str, Any],
        *,
        checkpoint_id: CheckpointId = None,
        storage_reader: StorageReader | None = None,
        planner: LoadPlanner | None = None,
        no_dist: bool = False,
        timeout: Timeout | EllipsisType = ...,
        stall_timeout: Timeout | EllipsisType = ...,
        phase_timeouts: Mapping[str, float] | None = None,
        coordinator_rank: int = 0,
        per_rank: PerRankPolicy = "error",
        allow_pickle: bool = False,
        shared_reads: SharedReads = "auto",
        latest_in: CheckpointId = None,
        verify: VerifyLevel = "manifest",
    ) -> LoadReport:
        """See :func:`dcp_engine.load`."""
        self._sessions.refuse_in_fork()
        if shared_reads not in SHARED_READS:
            raise UsageError(
                f"shared_reads is {shared_reads!r}",
                hint=f"it is one of {', '.join(map(repr, SHARED_READS))}",
            )
        deadlines = self._limits.deadlines(timeout, stall_timeout, phase_timeouts, LOAD_PHASES)
        found = None
        if latest_in is not None:
            if checkpoint_id is not None or storage_reader is not None:
                raise UsageError("latest_in finds the checkpoint: name no other beside it")
            found = agree_on_latest(
                self._sessions.get(no_dist, deadlines.timeout),
                self._registry,
                latest_in,
                verify=verify,
                deadlines=deadlines,
                coordinator_rank=coordinator_rank,
            )
            checkpoint_id = found.checkpoint
        reader = storage_reader
        if reader is None:
            place = required_place(checkpoint_id, "storage_reader")
            reader = _available(self._registry.reader, place)
        report = load(
            self._sessions.get(no_dist, deadlines.timeout, checkpoint_id),
            state_dict,
            checkpoint_id=text_of(checkpoint_id),
            reader=reader,
            planner=planner,
            group=self._sessions.place(no_dist).group,
            options=LoadOptions(
                deadlines=deadlines,
                coordinator_rank=coordinator_rank,
                per_rank=per_rank,
                allow_pickle=allow_pickle,
                shared_reads=shared_reads,
            ),
        )
        return report if found is None else replace(report, latest=found)

    def clear_plan_cache(self) -> None:
        """Forget the plans of earlier saves; the next save plans anew, on all ranks."""
        self._sessions.refuse_in_fork()
        self._plans.clear()
        self._alone_plans.clear()
        if self._async is not None:
            self._async.clear_plan_cache()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._sessions.closed

    @property
    def worker_pid(self) -> int | None:
        """Process id of this rank's worker, while there is one."""
        return None if self._async is None else self._async.worker_pid

    def close(self) -> None:
        """Wait for pending asynchronous saves, at most ``drain_timeout``; then end the worker, and
        give back memory and connections. Nothing in a fork, where they are its parent's.

        Raises the first failure of an asynchronous save that nobody has looked at; ``UsageError``
        in a callback of one, for which it would wait, and closes nothing then.
        """
        failure = self._close(self._drain_timeout)
        if failure is not None:
            raise failure

    def close_at_exit(self) -> None:
        """As ``close``, for the end of the program: waits only if ``drain_at_exit``, and logs what
        nobody can catch any more. An engine that saved asynchronously and was not closed does it
        by itself."""
        wait = self._drain_at_exit and not self._patience_is_over
        failure = self._close(self._drain_timeout if wait else 0.0)
        if failure is not None:
            logger.error("an asynchronous save failed", exc_info=failure)

    def _close(self, drain_timeout: float | None) -> BaseException | None:
        if self._sessions.inherited:
            return None
        if self._async is not None:
            self._async.refuse_in_callback("closing the engine")
        self._sessions.refuse_more()
        atexit.unregister(self.close_at_exit)
        failure = None if self._async is None else self._async.close(drain_timeout)
        self._sessions.close()
        return failure

    def _drain_at_main_end(self) -> None:
        """While threads and executors still take work. Training on another thread may go on."""
        if self._async is not None and self._drain_at_exit and not self._sessions.inherited:
            self._patience_is_over = not self._async.drain(self._drain_timeout)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.close()
        else:
            self.close_at_exit()

    def _async_saver(self) -> AsyncSaver:
        self._sessions.refuse_if_closed()
        if self._async is None:
            self._async = AsyncSaver(
                self._sessions.own_rank(), max_pending=self._max_pending, nice=self._nice
            )
            # This holds the engine, so that no save is lost with an engine that nobody holds.
            atexit.register(self.close_at_exit)
            call_at_main_end(self._drain_at_main_end)
        return self._async

    def _writer(
        self, checkpoint_id: CheckpointId, storage_writer: StorageWriter | None
    ) -> StorageWriter:
        if storage_writer is not None:
            return storage_writer
        place = required_place(checkpoint_id, "storage_writer")
        writer: StorageWriter = _available(self._registry.writer, place)
        return writer

    def _session(
        self,
        place: Place,
        no_dist: bool,
        options: SaveOptions,
        checkpoint_id: CheckpointId,
    ) -> Session:
        if not options.use_collectives:
            return self._sessions.alone(place.group.rank)
        return self._sessions.get(no_dist, options.deadlines.timeout, checkpoint_id)


def _available(find: Callable[..., Any], place: str | os.PathLike[str]) -> Any:
    """What ``find`` finds for ``place``; in its stead why not, for the operation to say."""
    try:
        return find(place)
    except StorageError as error:
        return Unavailable(error)
