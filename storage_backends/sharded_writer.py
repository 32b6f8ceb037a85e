"""The engine's own writer: the format over any ``ByteStore``, for columns and for items.

Belongs here: the two faces, ``ColumnarWriter``'s and DCP's. Does not belong here: the steps of a
save (``rank_save``), and how items become columns (``item_plans``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.futures import Future

from dcp_engine.coordination.identity import run_identity
from dcp_engine.errors import CheckpointError, NotFoundError, UsageError
from dcp_engine.format.digest import DEFAULT_BLOCK_SIZE, check_block_size
from dcp_engine.format.manifest import Manifest
from dcp_engine.format.names import MANIFEST_NAME, new_save_id
from dcp_engine.format.object_codec import EncodedObject
from dcp_engine.metadata import Metadata, StorageMeta
from dcp_engine.native_storage import (
    ColumnarWriter,
    CommitRecord,
    RankReport,
    SaveTicket,
)
from dcp_engine.plan import SavePlan
from dcp_engine.planner import SavePlanner
from dcp_engine.planning.columns import GlobalPlan, RankAssignment
from dcp_engine.redaction import redact_url
from dcp_engine.staging.writer_stager import WriterStager
from dcp_engine.storage import ByteStore, Check, WriteResult
from storage_backends.item_results import (
    PLANNER_DATA_NAME,
    columns_of_results,
    encoded_planner_data,
)
from storage_backends.item_writes import ItemTicket, lay_out_items, ticket_plans, write_results
from storage_backends.jobs import default_threads
from storage_backends.layout import lay_out_assignment
from storage_backends.open_manifest import read_manifest
from storage_backends.present import present_checkpoint
from storage_backends.rank_save import RankSave
from storage_backends.store_errors import require_shared, writing
from storage_backends.write_files import WriteOptions

__all__ = ["ShardedWriter"]

OpenStore = Callable[[str | os.PathLike[str]], ByteStore]
CheckpointId = str | os.PathLike[str]

_LIFE_CYCLE = (
    "set_up_storage_writer",
    "prepare_local_plan",
    "prepare_global_plan",
    "write_data",
    "finish",
)
INFLIGHT_PER_THREAD = 32 << 20
"""Bytes that one writing or reading thread may hold beside the tensors; see ``write_files`` and
``read_files`` for what they are."""


class ShardedWriter(ColumnarWriter, WriterStager):
    """Writes checkpoints of the engine's format.

    Args:
        open_store: opens the byte store of a checkpoint's id.
        checkpoint_id: where to write unless a save says otherwise.
        thread_count: threads that write one rank's files; None: by the machine.
        overwrite: False refuses a place where a checkpoint is.
        block_size: bytes under one digest, a power of two from 512 to 1 GiB.
        max_inflight_bytes: bound of the memory a save holds beside the tensors, 32 MiB at least
            (what one thread may hold); lowers
            ``thread_count`` where it must.
        bypass_cache: write past a cache that the system shares, where the medium can; None: if the
            save happens beside training.
    """

    OPTIONS = frozenset({"thread_count", "overwrite", "block_size", "max_inflight_bytes"})

    def __init__(
        self,
        open_store: OpenStore,
        checkpoint_id: CheckpointId | None = None,
        *,
        thread_count: int | None = None,
        overwrite: bool = True,
        block_size: int = DEFAULT_BLOCK_SIZE,
        max_inflight_bytes: int = 256 << 20,
        bypass_cache: bool | None = None,
    ) -> None:
        if thread_count is None:
            thread_count = default_threads()
        if thread_count < 1:
            raise UsageError(f"thread_count is {thread_count}, but somebody has to write")
        if not check_block_size(block_size):
            raise UsageError(
                f"block_size is {block_size}", hint="choose a power of two from 512 to 1 GiB"
            )
        self._open_store = open_store
        self._checkpoint_id = checkpoint_id
        # Public, as in DCP, where subclasses read and assign them.
        self.overwrite = overwrite
        self.thread_count = thread_count
        self._options = WriteOptions(block_size=block_size, bypass_cache=bypass_cache)
        self._most_threads = max(1, max_inflight_bytes // INFLIGHT_PER_THREAD)
        self._store: ByteStore | None = None
        self._save: RankSave | None = None
        self._observed: str | None = None
        self._rank = 0
        self._is_coordinator = True
        self._ticket: SaveTicket | None = None
        self._use_collectives = True

    # What both faces share

    @property
    def takes_columns(self) -> bool:
        return all(getattr(type(self), n) is getattr(ShardedWriter, n) for n in _LIFE_CYCLE)

    @property
    def checkpoint_id(self) -> CheckpointId | None:
        """Where it points, as it was told."""
        return self._checkpoint_id

    @property
    def checkpoint(self) -> str:
        if self._store is not None:
            return self._store.url
        return "" if self._checkpoint_id is None else redact_url(os.fspath(self._checkpoint_id))

    @property
    def bytes_written(self) -> int:
        return 0 if self._save is None else self._save.bytes_written

    def __getstate__(self) -> dict[str, Any]:
        """What it was told; a save that is under way stays here."""
        return {
            **self.__dict__,
            "_store": None,
            "_save": None,
            "_observed": None,
            "_ticket": None,
        }

    def _point_to(self, checkpoint_id: CheckpointId | None) -> ByteStore:
        """The store of ``checkpoint_id``, or of where the writer points already."""
        if checkpoint_id is not None and checkpoint_id != self._checkpoint_id:
            self._close_store()
            self._checkpoint_id = checkpoint_id
        if self._store is None:
            if self._checkpoint_id is None:
                raise UsageError(
                    f"{type(self).__name__} was told neither a path nor a checkpoint_id",
                    hint="pass checkpoint_id",
                )
            self._store = self._open_store(self._checkpoint_id)
        return self._store

    def _close_store(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def _begin(self, store: ByteStore, ticket: SaveTicket) -> RankSave:
        save = RankSave(store, ticket, self._options_for(ticket), overwrite=self.overwrite)
        # Known before it begins: a save that fails half-way through begin is aborted too.
        self._save = save
        save.begin()
        return save

    def _options_for(self, ticket: SaveTicket) -> WriteOptions:
        """Training beside the save keeps its processors, and what the system has cached for it."""
        threads = max(1, min(self.thread_count, self._most_threads))
        options = replace(self._options, threads=1 if ticket.beside_training else threads)
        if options.bypass_cache is None:
            options = replace(options, bypass_cache=ticket.beside_training or ticket.by_worker)
        return options

    def _current(self) -> RankSave:
        if self._save is None:
            raise UsageError("no save has begun", checkpoint=self.checkpoint)
        return self._save

    def _end(self) -> None:
        self._save = None
        self._observed = None
        self._ticket = None
        self._close_store()

    # Columns

    def observe(self, checkpoint_id: CheckpointId | None) -> str | None:
        store = self._point_to(checkpoint_id)
        with writing(store, "look for a checkpoint", file="manifest.json"):
            present = present_checkpoint(store)
        if present is not None and not self.overwrite:
            raise UsageError(
                f"checkpoint {present} is there, and overwrite is False",
                checkpoint=store.url,
                hint="choose another checkpoint_id, or allow to overwrite",
            )
        return present

    def begin_save(self, checkpoint_id: CheckpointId | None, ticket: SaveTicket) -> None:
        self._begin(self._point_to(checkpoint_id), ticket)

    def write_columns(
        self,
        assignment: RankAssignment,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        tensors: Sequence[torch.Tensor],
        objects: Mapping[str, EncodedObject],
        inline: frozenset[str],
        check: Check,
    ) -> RankReport:
        layout = lay_out_assignment(assignment, names, shapes, tensors, objects, inline)
        return self._current().write(layout, check)

    def commit_columns(
        self, plan: GlobalPlan, reports: Sequence[RankReport], observed: str | None
    ) -> CommitRecord:
        return self._current().commit(plan, reports, observed)

    def manifest_source(self, record: CommitRecord) -> Callable[[], Manifest]:
        checkpoint_id, open_store = self._checkpoint_id, self._open_store

        def load() -> Manifest:
            if checkpoint_id is None:
                raise UsageError("the writer was pointed to no checkpoint")
            with open_store(checkpoint_id) as store:
                return read_manifest(store, expected=record)[0]

        return load

    def find_commit(self, checkpoint_id: CheckpointId | None, save_id: str) -> CommitRecord | None:
        where = self._checkpoint_id if checkpoint_id is None else checkpoint_id
        if where is None:
            return None
        with self._open_store(where) as store:
            try:
                record = read_manifest(store)[1]
            except NotFoundError:
                return None
            if record.save_id != save_id:
                return None
            # Who committed it may have died, or be late, between the rename and this.
            with writing(store, "make the commit durable", file=MANIFEST_NAME):
                store.sync_directory("")
            return record

    def remove_replaced(self) -> None:
        self._current().remove_replaced()

    def end_save(self) -> None:
        self._end()

    def abort_save(self) -> None:
        save = self._save
        try:
            if save is not None:
                save.abort()
        finally:
            self._end()

    def leave_in_doubt(self) -> None:
        save = self._save
        try:
            if save is not None:
                save.leave_in_doubt()
        finally:
            self._end()

    # Items: DCP's life cycle

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self._end()
        if checkpoint_id is not None:
            self._checkpoint_id = checkpoint_id

    def announce(self, ticket: SaveTicket) -> None:
        self._ticket = ticket

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn this rank's part.

        Keywords: ``rank`` and ``use_collectives``, as DCP passes them, and ``ticket``, a
        ``SaveTicket`` with all that a saver knows, unless ``announce`` told it (needed without
        collectives).
        """
        ticket = self._ticket = kwargs.get("ticket", self._ticket)
        self._is_coordinator = is_coordinator
        rank = kwargs.get("rank")
        self._rank = ticket.rank if ticket is not None else (0 if rank is None else int(rank))
        self._use_collectives = (
            ticket.use_collectives
            if ticket is not None
            else bool(kwargs.get("use_collectives", True))
        )
        if not self._use_collectives and ticket is None:
            raise UsageError(
                "without collectives the ranks need a save id that they share",
                checkpoint=self.checkpoint,
                hint="pass ticket=SaveTicket(save_id=..., use_collectives=False, ...)",
            )
        store = self._point_to(None)
        if is_coordinator and self._use_collectives:
            self._observed = self.observe(None)
        if not is_coordinator:
            require_shared(store, "several ranks save together")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Put into every plan's ``storage_data`` what its rank needs to know of the save."""
        ticket = self._ticket
        if ticket is None:
            ticket = SaveTicket(
                save_id=new_save_id(),
                rank=self._rank,
                world_size=len(plans),
                coordinator_rank=self._rank,
                identity=run_identity(""),
            )
        self._begin(self._point_to(None), ticket)
        return ticket_plans(plans, ticket)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write_items(plan, planner))
        return future

    def _write_items(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        told = plan.storage_data
        if not isinstance(told, ItemTicket):
            raise UsageError(
                "the plan does not carry what prepare_global_plan put into its storage_data",
                checkpoint=self.checkpoint,
                hint="the planner's finish_plan must keep storage_data",
            )
        save = self._save
        if save is None:
            save = self._begin(self._point_to(None), self._own_ticket(told))
        layout, places = lay_out_items(plan.items, planner)
        try:
            report = save.write(layout, lambda: None)
        except CheckpointError as error:
            error.with_context(rank=told.rank)
            raise
        return write_results(plan.items, places, report)

    def _own_ticket(self, told: ItemTicket) -> SaveTicket:
        """What the plan told; and how this rank saves, if somebody announced that."""
        ticket, own = told.ticket(run_identity("")), self._ticket
        if own is None:
            return ticket
        return replace(
            ticket,
            by_worker=own.by_worker,
            beside_training=own.beside_training,
            nice=own.nice,
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        save = self._current()
        ticket = save.ticket
        ranks = list(range(len(results))) if ticket.use_collectives else [ticket.rank]
        plan, reports = columns_of_results(
            metadata, results, ranks=ranks, world_size=ticket.world_size
        )
        planner_data = encoded_planner_data(metadata.planner_data)
        if planner_data is not None:
            save.add_extra_file(PLANNER_DATA_NAME, planner_data)
        save.commit(plan, reports, self._observed)
        save.remove_replaced()
        self._end()

    def abort(self) -> None:
        self.abort_save()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)

    def storage_meta(self) -> StorageMeta | None:
        save_id = None if self._save is None else self._save.ticket.save_id
        return StorageMeta(checkpoint_id=self.checkpoint, save_id=save_id)
