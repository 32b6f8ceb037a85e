"""Checkpoints in the local (or mounted) file system: what users construct, and the backend.

Belongs here: DCP's names and arguments over ``FileSystemStore``. Does not belong here: system
calls (``filesystem_store``) and the format (``sharded_writer``, ``sharded_reader``).
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from dcp_engine.errors import UsageError
from dcp_engine.format.digest import DEFAULT_BLOCK_SIZE
from dcp_engine.registry import scheme_of
from dcp_engine.storage import ByteStore, StorageReader, StorageWriter
from storage_backends.filesystem_store import FileSystemStore, path_of
from storage_backends.sharded_backend import ShardedBackend
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter

__all__ = [
    "FileSystemBackend",
    "FileSystemReader",
    "FileSystemStore",
    "FileSystemWriter",
    "backend",
    "path_of",
]

CheckpointId = str | os.PathLike[str]


class _InDirectory:
    """What points to a directory, under DCP's name for that."""

    _checkpoint_id: CheckpointId | None
    _store: ByteStore | None

    @property
    def path(self) -> Path:
        """The directory. Assigning another one points there, as ``reset`` does.

        Raises:
            UsageError: it was told none; or the assignment comes between begin and end of a save
                or load.
        """
        if self._checkpoint_id is None:
            raise UsageError(
                f"{type(self).__name__} was told neither a path nor a checkpoint_id",
                hint="pass one of them",
            )
        return Path(path_of(self._checkpoint_id))

    @path.setter
    def path(self, path: CheckpointId) -> None:
        # A subclass may assign it before it calls __init__, which assigns it again.
        if self.__dict__.get("_store") is not None:
            if path_of(path) == str(self.path):
                return
            raise UsageError(
                f"{type(self).__name__} cannot be pointed elsewhere while a save or load is under "
                "way",
                checkpoint=str(self.path),
                hint="assign path before, or call reset",
            )
        self._checkpoint_id = path


class FileSystemWriter(ShardedWriter, _InDirectory):
    """Writes checkpoints into directories.

    Args:
        path: where to, unless a save says otherwise; a path or a ``file:`` URL.
        single_file_per_rank: accepted, as in DCP. A rank always writes one data file (more only
            where its header would become too long); a file per tensor gains nothing here.
        sync_files: False leaves it to the system when bytes reach the disk. A crash of the job
            still loses nothing that was committed; a power failure may.
        thread_count: threads that write one rank's file; None: as many as this process may use
            processors, shared with the other ranks of the host, at most 8.
        per_thread_copy_ahead: accepted, as in DCP. Device memory is copied in bounded slices.
        cache_staged_state_dict: accepted, as in DCP. Staging is the engine's, not the writer's.
        overwrite: False refuses a directory that holds a checkpoint. True replaces it at once:
            readers see the old one or the new one, whole.
        block_size: bytes under one digest.
        max_inflight_bytes: bound of the memory a save holds beside the tensors; 32 MiB at least.
        direct_io: write data files past the page cache: None, the default, in asynchronous saves
            only. It spares training processor time, memory bandwidth, and what the cache holds for
            it; who reads the checkpoint first reads from the disk. Only on file systems on a block
            device that take direct I/O, and with ``sync_files``; elsewhere it changes nothing.

    The arguments of DCP's are attributes, too; a subclass that overrides ``stage`` makes the copy
    that ``async_save`` saves.
    """

    def __init__(
        self,
        path: CheckpointId | None = None,
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int | None = None,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        max_inflight_bytes: int = 256 << 20,
        direct_io: bool | None = None,
    ) -> None:
        super().__init__(
            partial(FileSystemStore, sync=sync_files),
            path,
            thread_count=thread_count,
            overwrite=overwrite,
            block_size=block_size,
            max_inflight_bytes=max_inflight_bytes,
            bypass_cache=direct_io,
        )
        self.single_file_per_rank = single_file_per_rank
        self.sync_files = sync_files
        self.per_thread_copy_ahead = per_thread_copy_ahead
        self.cache_staged_state_dict = cache_staged_state_dict

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether it is a path or a ``file:`` URL whose nearest existing parent is a directory."""
        return _is_possible(checkpoint_id)


class FileSystemReader(ShardedReader, _InDirectory):
    """Reads checkpoints from directories.

    Args:
        path: what to read, unless a load says otherwise; a path or a ``file:`` URL.
        thread_count: threads that read for one rank; None: as ``FileSystemWriter`` has it.
        verify_digests: False skips the digests of tensor data: damage goes unnoticed.
        max_inflight_bytes: bound of the memory a load holds beside its destination; 32 MiB at
            least.
    """

    def __init__(
        self,
        path: CheckpointId | None = None,
        *,
        thread_count: int | None = None,
        verify_digests: bool = True,
        max_inflight_bytes: int = 256 << 20,
    ) -> None:
        super().__init__(
            FileSystemStore,
            path,
            thread_count=thread_count,
            verify_digests=verify_digests,
            max_inflight_bytes=max_inflight_bytes,
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether it is a path or a ``file:`` URL whose nearest existing parent is a directory."""
        return _is_possible(checkpoint_id)


def _is_possible(checkpoint_id: CheckpointId) -> bool:
    if scheme_of(checkpoint_id) != "file":
        return False
    path = path_of(checkpoint_id)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path)


class FileSystemBackend(ShardedBackend):
    """Plain paths, path objects and ``file:`` URLs. Has no state."""

    def open_store(self, url: CheckpointId, **options: Any) -> ByteStore:
        """The directory as a byte store. Option: ``sync_files``."""
        unknown = options.keys() - {"sync_files"}
        if unknown:
            raise UsageError(f"the file system does not know options {sorted(unknown)}")
        return FileSystemStore(url, sync=bool(options.get("sync_files", True)))

    def writer(self, checkpoint_id: CheckpointId, **options: Any) -> StorageWriter:
        """A ``FileSystemWriter``, with its keywords."""
        return FileSystemWriter(checkpoint_id, **options)

    def reader(self, checkpoint_id: CheckpointId, **options: Any) -> StorageReader:
        """A ``FileSystemReader``, with its keywords."""
        return FileSystemReader(checkpoint_id, **options)


backend = FileSystemBackend()
"""For the entry point."""
