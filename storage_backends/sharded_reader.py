"""The engine's own reader: the format over any ``ByteStore``, for columns and for items.

Belongs here: the two faces, ``ColumnarReader``'s and DCP's, and turning both into wanted boxes.
Does not belong here: reading and checking (``read_files``, ``checkpoint_files``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.futures import Future

from dcp_engine.errors import CheckpointError, NotFoundError, UsageError
from dcp_engine.format.manifest import Manifest, StoredObject
from dcp_engine.format.metadata_view import ManifestMetadata
from dcp_engine.format.names import extra_file_name
from dcp_engine.format.object_codec import decode_object
from dcp_engine.metadata import Metadata, StorageMeta
from dcp_engine.native_storage import ColumnarReader, CommitRecord
from dcp_engine.plan import LoadPlan
from dcp_engine.planner import LoadPlanner
from dcp_engine.planning.columns import LoadColumns
from dcp_engine.redaction import redact_url
from dcp_engine.storage import ByteStore, Check
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.item_reads import ReadingRank, load_objects, want_items
from storage_backends.item_results import PLANNER_DATA_NAME
from storage_backends.jobs import default_threads
from storage_backends.open_manifest import (
    decode_manifest_bytes,
    read_manifest,
    read_manifest_bytes,
)
from storage_backends.read_files import read_wanted
from storage_backends.small_reads import read_small
from storage_backends.store_errors import require_shared
from storage_backends.tensor_bytes import require_little_endian
from storage_backends.wanted_rows import checked, wanted_of_columns, wanted_of_items
from storage_backends.whole_files import check_extra, compare_headers, object_part

__all__ = ["ShardedReader"]

OpenStore = Callable[[str | os.PathLike[str]], ByteStore]
CheckpointId = str | os.PathLike[str]

_LIFE_CYCLE = (
    "read_metadata",
    "set_up_storage_reader",
    "prepare_local_plan",
    "prepare_global_plan",
    "read_data",
)
INFLIGHT_PER_THREAD = 32 << 20
"""Bytes of scratch memory that one thread may hold, generously; of a store that is slow to begin,
the two threads of a request."""


def _nothing_to_check() -> None:
    return None


class ShardedReader(ColumnarReader):
    """Reads checkpoints of the engine's format.

    Args:
        open_store: opens the byte store of a checkpoint's id.
        checkpoint_id: what to read unless a load says otherwise.
        thread_count: threads that read for one rank; None: by the machine.
        verify_digests: False skips the digests of tensor data, not those of manifest and extra
            files: damaged numbers then go unnoticed.
        max_inflight_bytes: bound of the memory a load holds beside its destination, 32 MiB at
            least (what one thread may hold); lowers
            ``thread_count`` where it must.
    """

    OPTIONS = frozenset({"thread_count", "verify_digests", "max_inflight_bytes"})

    def __init__(
        self,
        open_store: OpenStore,
        checkpoint_id: CheckpointId | None = None,
        *,
        thread_count: int | None = None,
        verify_digests: bool = True,
        max_inflight_bytes: int = 256 << 20,
    ) -> None:
        if thread_count is None:
            thread_count = default_threads()
        if thread_count < 1:
            raise UsageError(f"thread_count is {thread_count}, but somebody has to read")
        self._open_store = open_store
        self._checkpoint_id = checkpoint_id
        self._threads = max(1, min(thread_count, max_inflight_bytes // INFLIGHT_PER_THREAD))
        self._verify_digests = verify_digests
        self._store: ByteStore | None = None
        self._files: CheckpointFiles | None = None
        self._place = ReadingRank()
        self._world_size = 1

    # What both faces share

    def expect_ranks(self, world_size: int) -> None:
        self._world_size = world_size

    @property
    def takes_columns(self) -> bool:
        return all(getattr(type(self), n) is getattr(ShardedReader, n) for n in _LIFE_CYCLE)

    @property
    def checkpoint_id(self) -> CheckpointId | None:
        """Where it points, as it was told."""
        return self._checkpoint_id

    @property
    def checkpoint(self) -> str:
        if self._store is not None:
            return self._store.url
        return "" if self._checkpoint_id is None else redact_url(os.fspath(self._checkpoint_id))

    def open_checkpoint(
        self, checkpoint_id: CheckpointId | None, expected: CommitRecord | None = None
    ) -> tuple[Manifest, CommitRecord]:
        store = self._open(checkpoint_id)
        manifest, record = read_manifest(store, expected=expected)
        self._files = CheckpointFiles(store, manifest, verify_digests=self._verify_digests)
        return manifest, record

    def _open(self, checkpoint_id: CheckpointId | None) -> ByteStore:
        require_little_endian()
        self.close_checkpoint()
        if checkpoint_id is not None:
            self._checkpoint_id = checkpoint_id
        if self._checkpoint_id is None:
            raise UsageError(
                f"{type(self).__name__} was told neither a path nor a checkpoint_id",
                hint="pass checkpoint_id",
            )
        store = self._store = self._open_store(self._checkpoint_id)
        if self._world_size > 1:
            require_shared(store, f"{self._world_size} ranks load together")
        return store

    def manifest_bytes(self, record: CommitRecord) -> bytes:
        store = self._store
        if store is None:
            raise UsageError(
                "no checkpoint is open", checkpoint=self.checkpoint, hint="call open_checkpoint"
            )
        return read_manifest_bytes(store, record)

    def adopt_manifest(
        self, checkpoint_id: CheckpointId | None, data: bytes, record: CommitRecord
    ) -> Manifest:
        store = self._open(checkpoint_id)
        manifest = decode_manifest_bytes(data, record, url=store.url)
        self._files = CheckpointFiles(
            store, manifest, verify_digests=self._verify_digests, adopted=True
        )
        return manifest

    def close_checkpoint(self) -> None:
        self._files = None
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def _opened(self, manifest: Manifest) -> CheckpointFiles:
        files = self._files
        if files is None or files.manifest is not manifest:
            raise UsageError(
                "this manifest is not that of the checkpoint that is open",
                checkpoint=self.checkpoint,
                hint="call open_checkpoint, and use the manifest that it returns",
            )
        return files

    # Columns

    def read_columns(
        self,
        manifest: Manifest,
        plan: LoadColumns,
        tensors: Sequence[torch.Tensor],
        check: Check,
    ) -> int:
        files = self._opened(manifest)
        files.prefetch(np.unique(plan.file).tolist(), threads=self._threads, check=check)
        wanted = wanted_of_columns(files, plan, tensors)
        small = read_small(files, wanted.small, threads=self._threads, check=check)
        return small + read_wanted(files, wanted.boxes, threads=self._threads, check=check)

    def local_data_file(self, manifest: Manifest, row: int) -> str | None:
        return self._opened(manifest).local_path(row)

    def read_object(self, manifest: Manifest, stored: StoredObject) -> bytes:
        files = self._opened(manifest)
        if stored.inline is not None:
            files.require_data()
            return stored.inline
        files.header(stored.file)  # compares the file's size, before memory is taken
        data = torch.empty(stored.nbytes, dtype=torch.uint8, device="cpu")
        object_part(files, stored, 0, data, _nothing_to_check)
        return data.numpy().tobytes()

    def verify_files(self, manifest: Manifest, *, max_bytes: int) -> int:
        files = self._opened(manifest)
        rows = range(len(manifest.data_files))
        files.prefetch(rows, threads=self._threads, check=_nothing_to_check)
        compare_headers(files)
        files.require_data()
        stored = [*manifest.all_objects()]
        sizes = [entry.nbytes for entry in stored if entry.inline is None]
        sizes += [entry.size for entry in manifest.extra_files]
        most = min(max(max_bytes, 1), max(sizes, default=0))
        memory = torch.empty(most, dtype=torch.uint8, device="cpu")
        for entry in stored:
            for begin in range(0, entry.nbytes if entry.inline is None else 0, most or 1):
                part = memory[: entry.nbytes - begin]
                object_part(files, entry, begin, part, _nothing_to_check)
        for extra in manifest.extra_files:
            check_extra(files, extra, memory)
        return sum(sizes) + sum(len(entry.inline or b"") for entry in stored)

    def block_digests(self, manifest: Manifest, file: int, start: int) -> bytes:
        return self._opened(manifest).block_digests(file, start)

    def read_extra(self, manifest: Manifest, name: str) -> bytes:
        files = self._opened(manifest)
        try:
            content = files.extra(extra_file_name(name))
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise UsageError(str(error), checkpoint=files.store.url) from error
        if content is None:
            known = [entry.name.removeprefix("extra/") for entry in manifest.extra_files]
            raise NotFoundError(
                f"the checkpoint has no extra file {name!r}; it has {known}",
                checkpoint=files.store.url,
                file=name,
            )
        return content

    # Items: DCP's life cycle

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        self.close_checkpoint()
        self._place = ReadingRank()
        if checkpoint_id is not None:
            self._checkpoint_id = checkpoint_id

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        manifest, _ = self.open_checkpoint(None)
        meta = StorageMeta(checkpoint_id=self.checkpoint, load_id=manifest.save_id)
        metadata = ManifestMetadata.of(manifest, meta)
        planner_data = self._opened(manifest).extra(PLANNER_DATA_NAME)
        if planner_data is not None:
            metadata.planner_data = decode_object(
                planner_data, False, fqn="planner_data", checkpoint=self.checkpoint
            )
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Learn this rank's part; ``rank`` and ``world_size`` may come as keywords."""
        rank, world_size = kwargs.get("rank"), kwargs.get("world_size")
        self._place = ReadingRank(
            rank=None if rank is None else int(rank),
            world_size=None if world_size is None else int(world_size),
        )

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files = self._files
        if files is None:
            raise UsageError(
                "no checkpoint is open", checkpoint=self.checkpoint, hint="call read_metadata"
            )
        manifest, url = files.manifest, files.store.url
        items = want_items(plan.items, manifest, planner, place=self._place, checkpoint=url)
        rows = wanted_of_items(items, checkpoint=url)
        files.prefetch({row.file for row in rows}, threads=self._threads, check=_nothing_to_check)
        wanted = checked(files, rows)
        read_wanted(files, wanted, threads=self._threads, check=_nothing_to_check)
        for want in items:
            planner.commit_tensor(want.item, want.tensor)
        load_objects(
            plan.items,
            manifest,
            planner,
            lambda stored: self.read_object(manifest, stored),
            place=self._place,
            checkpoint=url,
        )
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)
