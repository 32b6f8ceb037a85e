"""The module functions: DCP's names and signatures over the default engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from dcp_engine.async_saver import AsyncCheckpointerType, AsyncSaveResponse
from dcp_engine.async_saver.saver import LowMemory
from dcp_engine.engine.arguments import CheckpointId, Timeout
from dcp_engine.engine.default import default_engine
from dcp_engine.engine.lookup import open_place
from dcp_engine.loader import LoadReport
from dcp_engine.loader.options import PerRankPolicy, SharedReads
from dcp_engine.loader.random_access import Checkpoint
from dcp_engine.loader.verify import VerifyLevel
from dcp_engine.metadata import STATE_DICT_TYPE, Metadata
from dcp_engine.planner import LoadPlanner, SavePlanner
from dcp_engine.registry import BackendRegistry
from dcp_engine.saver.options import ExtraContent
from dcp_engine.staging.stagers import AsyncStager
from dcp_engine.storage import StorageReader, StorageWriter

__all__ = ["async_save", "load", "open_checkpoint", "read_extra", "save"]


def save(
    state_dict: STATE_DICT_TYPE,
    *,
    checkpoint_id: CheckpointId = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    timeout: Timeout = 1800.0,
    stall_timeout: Timeout = 60.0,
    phase_timeouts: Mapping[str, float] | None = None,
    coordinator_rank: int = 0,
    extra_files: Mapping[str, ExtraContent] | None = None,
    user_metadata: Mapping[str, Any] | None = None,
    save_id: str | None = None,
    keep_replaced: bool = False,
    strict_replicas: bool = False,
) -> Metadata:
    """Save ``state_dict`` as one checkpoint; every rank of the group calls this.

    When it returns, on any rank, the checkpoint is committed and on stable storage. When it
    raises, it raises on every rank, and what was there before is still there.

    Args:
        state_dict: nested dicts, lists and tuples of DTensors, ShardedTensors, tensors, Python
            objects and ``Stateful`` values. What is not sharded must be the same on all ranks;
            wrap rank-local values in ``PerRank``.
        checkpoint_id: path or URL of the checkpoint; optional with a ``storage_writer`` that
            knows it.
        storage_writer: where to; by default the registered backend of ``checkpoint_id``.
        planner: what to write and who writes it; ``DefaultSavePlanner()`` by default.
        process_group: the ranks that save together; by default all.
        no_dist: save from this process alone.
        use_collectives: False saves without a word between ranks: every rank commits a manifest
            of its own, and the checkpoint exists when all are there. Needs ``save_id`` where the
            job has no run id (torchrun gives one).
        timeout: seconds (or timedelta) for the whole operation; None waits forever.
        stall_timeout: seconds without a heartbeat after which a rank counts as dead. A slow write
            that still beats is no stall.
        phase_timeouts: seconds by phase: ``agree``, ``plan``, ``compare``, ``write``, ``commit``.
        coordinator_rank: the rank, in the group, that plans and commits.
        extra_files: name to bytes, text, or path of a file to copy; in the same transaction, the
            coordinator's count. Read them with ``read_extra``.
        user_metadata: JSON values to keep in the manifest; the coordinator's count.
        save_id: 32 hexadecimal digits that all ranks share, for ``use_collectives=False``.
        keep_replaced: leave the data of the checkpoint this one replaces, for ``prune``.
        strict_replicas: refuse to save when replicated values differ between ranks, and compare
            large tensors too. By default small values are compared, and a difference is a
            ``ReplicasDifferWarning``.

    Returns:
        The checkpoint's ``Metadata``, read from the manifest when it is looked at.

    Raises:
        CheckpointException: on every rank; ``failures`` names the ranks and their errors, and
            ``kind`` says what to do. With kind ``commit_in_doubt`` the checkpoint may be
            committed: the next save, load or prune decides by the manifest.
        UsageError: the arguments contradict each other.
    """
    return default_engine(process_group).save(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_writer=storage_writer,
        planner=planner,
        no_dist=no_dist,
        use_collectives=use_collectives,
        timeout=timeout,
        stall_timeout=stall_timeout,
        phase_timeouts=phase_timeouts,
        coordinator_rank=coordinator_rank,
        extra_files=extra_files,
        user_metadata=user_metadata,
        save_id=save_id,
        keep_replaced=keep_replaced,
        strict_replicas=strict_replicas,
    )


def async_save(
    state_dict: STATE_DICT_TYPE,
    *,
    checkpoint_id: CheckpointId = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    background_staging: bool = False,
    on_low_memory: LowMemory = "error",
    timeout: Timeout = 1800.0,
    stall_timeout: Timeout = 60.0,
    phase_timeouts: Mapping[str, float] | None = None,
    coordinator_rank: int = 0,
    extra_files: Mapping[str, ExtraContent] | None = None,
    user_metadata: Mapping[str, Any] | None = None,
    save_id: str | None = None,
    keep_replaced: bool = False,
    strict_replicas: bool = False,
) -> AsyncSaveResponse:
    """Save ``state_dict`` while training goes on; every rank of the group calls this.

    Returns when the state is copied to reused staging memory; a thread of this process, or a
    worker process, saves the copy. Saves happen in the order of the calls. While an earlier save
    holds the staging memory the call waits for it (``Engine(max_pending=2)`` has room for two).

    Args:
        state_dict, checkpoint_id, storage_writer, planner, process_group, no_dist,
            use_collectives, timeout, stall_timeout, coordinator_rank, extra_files, user_metadata,
            save_id, keep_replaced, strict_replicas: as in ``save``. A writer that is an
            ``AsyncStager`` too is asked to stage; a built-in one if a subclass overrides ``stage``.
        async_checkpointer_type: ``THREAD``, or ``PROCESS``: planning, digests and writing take
            nothing from this process. Writer and planner are pickled for the worker at the call,
            and state that they change stays there.
        async_stager: who copies; by default the engine, into memory that it keeps.
        background_staging: return before the copy is made. Then nothing may write to the state
            until ``staging_completion``: call ``Engine.wait_for_staging`` before the first write,
            or install ``Engine.install_staging_hook``.
        on_low_memory: what to do if staging memory cannot be had: ``"error"``, or ``"sync"``: save
            while the caller waits.
        phase_timeouts: seconds by phase: those of ``save``, and ``staging``, ``group``, ``join``.

    Returns:
        A future of the committed checkpoint's ``Metadata``, with ``staging_completion`` and
        ``progress()``. A failure that nobody has looked at is raised by the next call, or by
        ``Engine.close``, and logged at exit. The end of the program waits for pending saves.

    Raises:
        CheckpointError: this rank could not begin; the futures of the others fail. That the save
            failed later is in the future, as ``save`` would raise it.
    """
    return default_engine(process_group).async_save(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_writer=storage_writer,
        planner=planner,
        async_checkpointer_type=async_checkpointer_type,
        async_stager=async_stager,
        no_dist=no_dist,
        use_collectives=use_collectives,
        background_staging=background_staging,
        on_low_memory=on_low_memory,
        timeout=timeout,
        stall_timeout=stall_timeout,
        phase_timeouts=phase_timeouts,
        coordinator_rank=coordinator_rank,
        extra_files=extra_files,
        user_metadata=user_metadata,
        save_id=save_id,
        keep_replaced=keep_replaced,
        strict_replicas=strict_replicas,
    )


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: CheckpointId = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    timeout: Timeout = 1800.0,
    stall_timeout: Timeout = 60.0,
    phase_timeouts: Mapping[str, float] | None = None,
    coordinator_rank: int = 0,
    per_rank: PerRankPolicy = "error",
    allow_pickle: bool = False,
    shared_reads: SharedReads = "auto",
    latest_in: CheckpointId = None,
    verify: VerifyLevel = "manifest",
) -> LoadReport:
    """Load a checkpoint into ``state_dict``; every rank of the group calls this.

    Tensors are filled in place, whatever number of ranks saved them; other leaves are replaced;
    ``Stateful`` values get ``load_state_dict``. Each rank reads only the bytes it needs, and every
    byte is checked against its digest.

    Args:
        state_dict: says what to load; its tensors give the memory.
        checkpoint_id: path or URL of the checkpoint; optional with a ``storage_reader`` that
            knows it.
        storage_reader: where from; by default the registered backend of ``checkpoint_id``.
        planner: what to read; ``DefaultLoadPlanner()`` by default.
        process_group, no_dist, timeout, stall_timeout, coordinator_rank: as in ``save``.
        phase_timeouts: seconds by phase: ``latest``, ``metadata``, ``manifest``, ``plan``,
            ``share``, ``read``, ``restore``.
        per_rank: what to do with ``PerRank`` values saved at another world size: ``"error"``,
            ``"skip"`` (keep what is there), or ``"list"`` (put a list of all ranks' values). Those
            that were the same on all ranks (as of a single rank they are) are read as if they
            were replicated.
        allow_pickle: execute the pickle of objects that the safe encoding and
            ``torch.load(weights_only=True)`` cannot read. Only for checkpoints you trust.
        shared_reads: what becomes of bytes that several ranks need: ``"once"``: one of them reads
            and verifies them and hands them on, so that the job reads what it needs about once;
            ``"direct"``: every rank reads for itself; ``"auto"``: once where the medium is not
            local to one host that all ranks run on, else direct. The same on all ranks.
        latest_in: load the newest checkpoint below this directory that is whole, instead of a
            named one: one rank looks for it, all load it, and the report says what was passed
            over and why. See ``latest``.
        verify: how closely ``latest_in`` looks: ``"manifest"``, or ``"full"``: every byte is read
            and compared with its digest before the load begins.

    Returns:
        What was read, missing and not asked for.

    Raises:
        CheckpointException: on every rank; see ``save``. If the error came while reading, the
            destination's tensors may be partly filled, and the message says so.
    """
    return default_engine(process_group).load(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_reader=storage_reader,
        planner=planner,
        no_dist=no_dist,
        timeout=timeout,
        stall_timeout=stall_timeout,
        phase_timeouts=phase_timeouts,
        coordinator_rank=coordinator_rank,
        per_rank=per_rank,
        allow_pickle=allow_pickle,
        shared_reads=shared_reads,
        latest_in=latest_in,
        verify=verify,
    )


def open_checkpoint(checkpoint: str | os.PathLike[str], **options: Any) -> Checkpoint:
    """Open a committed checkpoint as a read-only mapping of names; public as ``dcp_engine.open``.

    ``ckpt["model.weight"]`` is a lazy handle with ``shape`` and ``dtype``; indexing it reads and
    verifies only the blocks it touches::

        with dcp_engine.open("/checkpoints/step-1000") as ckpt:
            rows = ckpt["model.weight"][1000:2000, ::2]

    Needs no process group. ``options`` go to the storage backend's reader.

    Raises:
        NotFoundError: there is no committed checkpoint.
        DamagedCheckpointError: its manifest is not what was written.
    """
    return open_place(BackendRegistry(), checkpoint, options)


def read_extra(checkpoint: str | os.PathLike[str], name: str) -> bytes:
    """The content of ``extra_files[name]`` of a committed checkpoint, verified. Needs no group.

    Raises:
        NotFoundError: no checkpoint there, or no such extra file.
        DamagedCheckpointError: the file is not what was written.
    """
    with open_place(BackendRegistry(), checkpoint, {}) as opened:
        return opened.read_extra(name)
