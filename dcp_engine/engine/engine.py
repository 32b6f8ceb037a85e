"""``Engine``: owns the session with the other ranks, and runs saves and loads over it."""

from __future__ import annotations

import atexit
import copy
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import EllipsisType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.utils.hooks import RemovableHandle

from dcp_engine.async_saver import AsyncCheckpointerType, AsyncSaver, AsyncSaveResponse, SaveJob
from dcp_engine.async_saver.saver import LowMemory
from dcp_engine.coordination.collective import CollectiveSession
from dcp_engine.coordination.group import describe_group
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Deadlines, Session
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.single import SingleSession
from dcp_engine.engine.lookup import agree_on_latest
from dcp_engine.errors import CheckpointException, CoordinationError, UsageError
from dcp_engine.format.names import is_save_id, new_save_id
from dcp_engine.loader import LoadOptions, LoadReport, load
from dcp_engine.loader.options import LOAD_PHASES, SHARED_READS, PerRankPolicy, SharedReads
from dcp_engine.loader.verify import VerifyLevel
from dcp_engine.metadata import STATE_DICT_TYPE, Metadata
from dcp_engine.planner import LoadPlanner, SavePlanner
from dcp_engine.registry import BackendRegistry
from dcp_engine.saver import PlanMemory, SaveOptions, save
from dcp_engine.saver.options import ASYNC_SAVE_PHASES, SAVE_PHASES, ExtraContent
from dcp_engine.saver.save import extra_contents
from dcp_engine.staging.hooks import install_staging_hook
from dcp_engine.staging.stagers import AsyncStager
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.storage import StorageReader, StorageWriter

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

Timeout = float | timedelta | None
CheckpointId = str | os.PathLike[str] | None


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

    The session with the other ranks opens at the first operation that needs it, which must be
    the same one on all ranks. A context manager; ``close`` may be called twice.
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
    ) -> None:
        self._process_group = process_group
        self._timeout = timeout
        self._stall_timeout = stall_timeout
        self._connect_timeout = connect_timeout
        self._max_pending = max_pending
        self._drain_at_exit = drain_at_exit
        self._drain_timeout = drain_timeout
        self._async: AsyncSaver | None = None
        self._session: Session | None = None
        self._alone: Session | None = None
        self._collective_free_saves = 0
        self._closed = False
        self._owner = os.getpid()
        self._registry = BackendRegistry()
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
        writer = self._writer(checkpoint_id, storage_writer)
        place = self._place(no_dist)
        options = SaveOptions(
            deadlines=self._deadlines(timeout, stall_timeout, phase_timeouts, SAVE_PHASES),
            coordinator_rank=coordinator_rank,
            use_collectives=use_collectives,
            extra_files=dict(extra_files or {}),
            user_metadata=dict(user_metadata or {}),
            save_id=self._save_id(place, use_collectives, save_id),
            keep_replaced=keep_replaced,
            strict_replicas=strict_replicas,
        )
        limit = options.deadlines.timeout
        return save(
            self._session_for(no_dist, limit, checkpoint_id)
            if use_collectives
            else self._session_alone(),
            state_dict,
            checkpoint_id=_text(checkpoint_id),
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
        kind = AsyncCheckpointerType(async_checkpointer_type)
        writer = self._writer(checkpoint_id, storage_writer)
        if async_stager is None and isinstance(writer, AsyncStager):
            async_stager = writer
        place = self._place(no_dist)
        options = SaveOptions(
            deadlines=self._deadlines(timeout, stall_timeout, phase_timeouts, ASYNC_SAVE_PHASES),
            coordinator_rank=coordinator_rank,
            use_collectives=use_collectives,
            extra_files=dict(extra_files or {}),
            user_metadata=copy.deepcopy(dict(user_metadata or {})),
            save_id=self._save_id(place, use_collectives, save_id),
            keep_replaced=keep_replaced,
            strict_replicas=strict_replicas,
        )
        # What lies in files now is what is saved, not what will lie there in a minute.
        mine = place.group.rank == coordinator_rank
        options = replace(options, extra_files=extra_contents(options) if mine else {})
        limit = options.deadlines.timeout
        session = (
            self._session_for(no_dist, limit, checkpoint_id)
            if use_collectives
            else self._session_alone()
        )
        if isinstance(session, CollectiveSession):
            raise UsageError(
                "an asynchronous save needs a store: over the process group its messages would "
                "mix with those of training",
                hint="initialize the process group with a TCPStore or a FileStore, or use save",
            )
        job = SaveJob(
            session=session,
            number=session.take_number(),
            checkpoint_id=_text(checkpoint_id),
            writer=writer,
            group=place.group,
            world_size=place.world_size,
            memory=self._alone_plans if no_dist else self._plans,
            options=options,
        )
        return self._async_saver(place).save(
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
        no more than the later ones: spawn the worker, size and touch the staging memory, import
        the storage backend. Every rank that will save calls it; it says nothing to the other ranks
        but to open the session.

        Args:
            state_dict: of the size and shape of what will be saved.
            checkpoint_id: a place of the kind that will be saved to; by default a local path.
            async_checkpointer_type: who will save.
        Raises:
            StagingError: too little memory (kind ``out_of_memory``).
        """
        kind = AsyncCheckpointerType(async_checkpointer_type)
        self._registry.backend(os.curdir if checkpoint_id is None else checkpoint_id)
        self._session_for(no_dist=False)
        self._async_saver(self._place(no_dist=False)).warmup(state_dict, kind=kind)

    def wait_for_staging(self, timeout: float | None = None) -> None:
        """Return when no asynchronous save reads the state any more; to be called before the
        first write after ``async_save(background_staging=True)``.

        Raises:
            StagingError: kind ``timeout`` after ``timeout`` seconds; else what staging failed with.
        """
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
        if shared_reads not in SHARED_READS:
            raise UsageError(
                f"shared_reads is {shared_reads!r}",
                hint=f"it is one of {', '.join(map(repr, SHARED_READS))}",
            )
        deadlines = self._deadlines(timeout, stall_timeout, phase_timeouts, LOAD_PHASES)
        found = None
        if latest_in is not None:
            if checkpoint_id is not None or storage_reader is not None:
                raise UsageError("latest_in finds the checkpoint: name no other beside it")
            found = agree_on_latest(
                self._session_for(no_dist, deadlines.timeout),
                self._registry,
                latest_in,
                verify=verify,
                deadlines=deadlines,
                coordinator_rank=coordinator_rank,
            )
            checkpoint_id = found.checkpoint
        reader = storage_reader
        if reader is None:
            reader = self._registry.reader(_required(checkpoint_id, "storage_reader"))
        report = load(
            self._session_for(no_dist, deadlines.timeout, checkpoint_id),
            state_dict,
            checkpoint_id=_text(checkpoint_id),
            reader=reader,
            planner=planner,
            group=self._place(no_dist).group,
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
        self._plans.clear()
        self._alone_plans.clear()
        if self._async is not None:
            self._async.clear_plan_cache()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def worker_pid(self) -> int | None:
        """Process id of this rank's worker, while there is one."""
        return None if self._async is None else self._async.worker_pid

    def close(self) -> None:
        """Wait for pending asynchronous saves, at most ``drain_timeout``; then end the worker, and
        give back memory and connections.

        Raises the first failure of an asynchronous save that nobody has looked at.
        """
        failure = self._close(self._drain_timeout)
        if failure is not None:
            raise failure

    def close_at_exit(self) -> None:
        """As ``close``, for the end of the program: waits only if ``drain_at_exit``, and logs what
        nobody can catch any more. An engine that saved asynchronously and was not closed does it
        by itself. Nothing in a fork, which has no part in the saves."""
        if os.getpid() != self._owner:
            return
        failure = self._close(self._drain_timeout if self._drain_at_exit else 0.0)
        if failure is not None:
            logger.error("an asynchronous save failed", exc_info=failure)

    def _close(self, drain_timeout: float | None) -> BaseException | None:
        self._closed = True
        atexit.unregister(self.close_at_exit)
        failure = None if self._async is None else self._async.close(drain_timeout)
        for session in (self._session, self._alone):
            if session is not None:
                session.close()
        self._session = self._alone = None
        return failure

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

    def _async_saver(self, place: _Place) -> AsyncSaver:
        self._refuse_if_closed()
        if self._async is None:
            self._async = AsyncSaver(place.group.rank, max_pending=self._max_pending)
            # This holds the engine, so that no save is lost with an engine that nobody holds.
            atexit.register(self.close_at_exit)
        return self._async

    def _writer(
        self, checkpoint_id: CheckpointId, storage_writer: StorageWriter | None
    ) -> StorageWriter:
        if storage_writer is not None:
            return storage_writer
        return self._registry.writer(_required(checkpoint_id, "storage_writer"))

    def _save_id(self, place: _Place, use_collectives: bool, save_id: str | None) -> str | None:
        if not use_collectives:
            return self._token(place, save_id)
        if save_id is not None:
            raise UsageError(
                "save_id is for use_collectives=False; with collectives the coordinator makes one",
                hint="leave save_id out",
            )
        return None

    def _deadlines(
        self,
        timeout: Timeout | EllipsisType,
        stall_timeout: Timeout | EllipsisType,
        phases: Mapping[str, float] | None,
        known: Sequence[str],
    ) -> Deadlines:
        unknown = [phase for phase in phases or {} if phase not in known]
        if unknown:
            raise UsageError(
                f"phase_timeouts names {unknown}, which are no phases of this operation",
                hint=f"its phases are {', '.join(known)}",
            )
        return Deadlines(
            timeout=_seconds(self._timeout if isinstance(timeout, EllipsisType) else timeout),
            stall_timeout=_seconds(
                self._stall_timeout if isinstance(stall_timeout, EllipsisType) else stall_timeout
            ),
            phases=dict(phases or {}),
        )

    def _session_for(
        self, no_dist: bool, timeout: float | None = None, checkpoint_id: CheckpointId = None
    ) -> Session:
        """The session with the ranks that ``no_dist`` leaves; opened at the first use, within the
        ``timeout`` of the operation that needs it."""
        if no_dist or not self._distributed:
            return self._session_alone()
        self._refuse_if_closed()
        if self._session is None:
            limit = min(self._connect_timeout, math.inf if timeout is None else timeout)
            try:
                self._session = open_session(self._process_group, connect_timeout=limit)
            except CoordinationError as error:
                raise CheckpointException(
                    f"the ranks did not come together: {error.message}",
                    kind=error.kind,
                    checkpoint=checkpoint_id,
                    hint=error.hint,
                ) from error
        return self._session

    def _session_alone(self) -> Session:
        self._refuse_if_closed()
        if self._alone is None:
            self._alone = SingleSession(run_identity(""))
        return self._alone

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError("this engine is closed", hint="make a new dcp_engine.Engine")

    def _place(self, no_dist: bool) -> _Place:
        if no_dist or not self._distributed:
            return _Place(group=GroupRanks(), world_size=1, name="")
        info = describe_group(self._process_group)
        return _Place(
            group=GroupRanks(ranks=info.global_ranks, rank=info.rank),
            world_size=info.world_size,
            name=info.name,
        )

    def _token(self, place: _Place, save_id: str | None) -> str:
        """The save id that all ranks of a collective-free save come to without talking."""
        if save_id is not None:
            if not is_save_id(save_id):
                raise UsageError(
                    f"save_id {save_id!r} is not 32 hexadecimal digits",
                    hint="use uuid.uuid4().hex, the same on all ranks",
                )
            return save_id
        number, self._collective_free_saves = (
            self._collective_free_saves,
            self._collective_free_saves + 1,
        )
        identity = run_identity(place.name)
        if place.world_size == 1 and not identity.run_id:
            return new_save_id()
        if not identity.run_id:
            raise UsageError(
                "without collectives the ranks need a save id that they share, and this job has "
                "no run id to make one of",
                hint="pass save_id= (32 hexadecimal digits, the same on all ranks, new for each "
                "save), or start the job with torchrun --rdzv-id",
            )
        words = (identity.run_id, identity.restart_count, place.name, number)
        return xxhash.xxh3_128_hexdigest(repr(words).encode())

    @property
    def _distributed(self) -> bool:
        return self._process_group is not None or (dist.is_available() and dist.is_initialized())


@dataclass(frozen=True, kw_only=True)
class _Place:
    """This process in the group of an operation."""

    group: GroupRanks
    world_size: int
    name: str


def _seconds(value: Timeout) -> float | None:
    return value.total_seconds() if isinstance(value, timedelta) else value


def _text(checkpoint_id: CheckpointId) -> str | None:
    return None if checkpoint_id is None else os.fspath(checkpoint_id)


def _required(checkpoint_id: CheckpointId, other: str) -> str:
    if checkpoint_id is None:
        raise UsageError(f"neither checkpoint_id nor {other} was given", hint="give one of them")
    return os.fspath(checkpoint_id)
