"""Checkpoints on any fsspec file system: what users construct, and the backend.

Belongs here: DCP's names and arguments over ``FsspecByteStore``. Does not belong here: requests,
retries and errors (``fsspec_store``), and the format (``sharded_writer``, ``sharded_reader``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from dcp_engine.errors import UsageError
from dcp_engine.format.digest import DEFAULT_BLOCK_SIZE
from dcp_engine.registry import scheme_of
from dcp_engine.storage import ByteStore, StorageReader, StorageWriter
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.fsspec_open import known_protocols, open_filesystems, require_known
from storage_backends.fsspec_store import READERS, FsspecByteStore, Limits
from storage_backends.retry import RetryPolicy
from storage_backends.sharded_backend import ShardedBackend
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import INFLIGHT_PER_THREAD, ShardedWriter
from storage_backends.url_options import split_query

__all__ = [
    "FsspecBackend",
    "FsspecByteStore",
    "FsspecReader",
    "FsspecWriter",
    "RetryPolicy",
    "backend",
    "open_fsspec_store",
]

CheckpointId = str | os.PathLike[str]

_LIMITS = frozenset({"streams", "part_bytes", "request_bytes", "max_inflight_bytes", "retries"})
_FORMAT = (ShardedWriter.OPTIONS | ShardedReader.OPTIONS) - _LIMITS
"""Options of writer and reader, which may also be in a URL's query."""


def open_fsspec_store(
    url: CheckpointId,
    *,
    fs: Any = None,
    streams: int | None = None,
    part_bytes: int | None = None,
    request_bytes: int | None = None,
    max_inflight_bytes: int = 256 << 20,
    retries: int | RetryPolicy | None = None,
    **storage_options: Any,
) -> ByteStore:
    """The byte store at ``url``.

    Args:
        url: as fsspec takes it, perhaps chained. What its query says of the options here is used,
            unless it is given as a keyword too; the rest of the query is for the file system.
        fs: a file system object to use instead of opening one.
        streams: requests at a time; None: by the kind of file system, 16 for an object store.
        part_bytes: bytes of one request that writes; None: 16 MiB, for SFTP 8 MiB.
        request_bytes: most bytes of one request that reads; None: 16 MiB, for file servers 8 MiB,
            and less where ``max_inflight_bytes`` is less than ``streams`` times that.
        max_inflight_bytes: bound of what is held of files being written, and of what is held of
            answers.
        retries: how often a request that failed is made again, or a ``RetryPolicy``.
        **storage_options: what the file system is opened with: as ``fsspec.core.url_to_fs`` takes
            them, also by protocol for chained URLs.

    A local directory comes as a ``FileSystemStore``, which does more than fsspec can.

    Raises ``StorageError``, ``UsageError``.
    """
    place, query = split_query(url)
    given = {
        "streams": streams,
        "part_bytes": part_bytes,
        "request_bytes": request_bytes,
        "retries": retries,
    }
    limits = {name: query.pop(name) for name in _LIMITS & query.keys()}
    limits |= {name: value for name, value in given.items() if value is not None}
    limits.setdefault("max_inflight_bytes", max_inflight_bytes)
    rest = {name: value for name, value in query.items() if name not in _FORMAT}
    chosen = _limits(limits, place)
    filesystems = open_filesystems(
        place, storage_options, last_options=rest, fs=fs, retry=chosen.retry
    )
    if fs is None and issubclass(filesystems.kind, LocalFileSystem) and not filesystems.cache:
        return FileSystemStore(filesystems.path)
    return FsspecByteStore(filesystems, chosen)


def _limits(given: Mapping[str, Any], url: str) -> Limits:
    retry = given.get("retries")
    others = {name: value for name, value in given.items() if name != "retries"}
    for name, value in {**others, "retries": retry}.items():
        is_policy = name == "retries" and (value is None or isinstance(value, RetryPolicy))
        if not is_policy and (type(value) is not int or value < (name != "retries")):
            raise UsageError(f"{name} is {value!r}, and should be a number", checkpoint=url)
    if isinstance(retry, int):
        retry = RetryPolicy(attempts=retry + 1)
    return Limits(retry=retry or RetryPolicy(), **others)


class FsspecWriter(ShardedWriter):
    """Writes checkpoints to any fsspec file system.

    Args:
        path: where to, unless a save says otherwise: a URL as fsspec takes it.
        single_file_per_rank: accepted, as in DCP. A rank always writes one data file.
        sync_files: accepted, as in DCP. What an object store has confirmed is durable; SFTP and
            others promise nothing.
        thread_count: accepted, as in DCP. How much goes on at a time is said by ``streams``.
        per_thread_copy_ahead: accepted, as in DCP.
        overwrite: False refuses a place that holds a checkpoint. True replaces it at once.
        _extensions: DCP's stream transforms; the format of the engine knows none, so they are
            refused.
        serialization_format: accepted, as in DCP. The format is always the engine's own, whose
            data files are safetensors.
        block_size: bytes under one digest.
        max_inflight_bytes: bound of the memory a save holds beside the tensors; 64 MiB at least.
        fs, streams, part_bytes, request_bytes, retries, **storage_options: see
            ``open_fsspec_store``.
    """

    def __init__(
        self,
        path: CheckpointId | None = None,
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        overwrite: bool = True,
        _extensions: Any = None,
        serialization_format: Any = None,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        max_inflight_bytes: int = 256 << 20,
        fs: Any = None,
        streams: int | None = None,
        part_bytes: int | None = None,
        request_bytes: int | None = None,
        retries: int | RetryPolicy | None = None,
        **storage_options: Any,
    ) -> None:
        if _extensions:
            raise UsageError(
                "_extensions transform DCP's own streams, and the engine writes none",
                hint="leave them out, or save with a StorageWriter of your own",
            )

        open_store = partial(
            open_fsspec_store,
            fs=fs,
            streams=streams,
            part_bytes=part_bytes,
            request_bytes=request_bytes,
            # What the one thread holds that digests and copies is not the store's.
            max_inflight_bytes=max(max_inflight_bytes - INFLIGHT_PER_THREAD, 1 << 20),
            retries=retries,
            **storage_options,
        )
        super().__init__(
            open_store,
            path,
            thread_count=thread_count,
            overwrite=overwrite,
            block_size=block_size,
            max_inflight_bytes=max_inflight_bytes,
        )
        self.single_file_per_rank = single_file_per_rank
        self.sync_files = sync_files
        self.per_thread_copy_ahead = per_thread_copy_ahead
        self.serialization_format = serialization_format

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether it is text, and fsspec knows its scheme (that of every link of a chain)."""
        return _is_possible(checkpoint_id)


class FsspecReader(ShardedReader):
    """Reads checkpoints from any fsspec file system.

    Args:
        path: what to read, unless a load says otherwise: a URL as fsspec takes it.
        thread_count: how many reads are under way for one rank, each of which makes a quarter of
            ``streams`` requests at once; None: 4.
        verify_digests: False skips the digests of tensor data: damage goes unnoticed.
        max_inflight_bytes: bound of the memory a load holds beside its destination: half of it
            for answers, half for what threads work on. Lowers ``request_bytes`` (unless it is
            given) and ``thread_count`` where it must.
        fs, streams, request_bytes, retries, **storage_options: see ``open_fsspec_store``.
    """

    def __init__(
        self,
        path: CheckpointId | None = None,
        *,
        thread_count: int | None = None,
        verify_digests: bool = True,
        max_inflight_bytes: int = 256 << 20,
        fs: Any = None,
        streams: int | None = None,
        request_bytes: int | None = None,
        retries: int | RetryPolicy | None = None,
        **storage_options: Any,
    ) -> None:
        super().__init__(
            partial(
                open_fsspec_store,
                fs=fs,
                streams=streams,
                request_bytes=request_bytes,
                max_inflight_bytes=max(max_inflight_bytes // 2, 1),
                retries=retries,
                **storage_options,
            ),
            path,
            thread_count=READERS if thread_count is None else thread_count,
            verify_digests=verify_digests,
            max_inflight_bytes=max_inflight_bytes // 2,
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether it is text, and fsspec knows its scheme (that of every link of a chain)."""
        return _is_possible(checkpoint_id)


def _is_possible(checkpoint_id: CheckpointId) -> bool:
    if not isinstance(checkpoint_id, str):
        return False
    known = known_protocols()
    return all(scheme_of(link) in known or link in known for link in checkpoint_id.split("::"))


class FsspecBackend(ShardedBackend):
    """Every scheme that fsspec knows, and chained URLs. Has no state."""

    def open_store(self, url: CheckpointId, **options: Any) -> ByteStore:
        """See ``open_fsspec_store`` for the options."""
        return open_fsspec_store(url, **options)

    def writer(self, checkpoint_id: CheckpointId, **options: Any) -> StorageWriter:
        """A ``FsspecWriter``, with its keywords; the URL's query may hold them too.

        Raises ``StorageError(kind="unsupported_storage")`` for a scheme that cannot be used.
        """
        require_known(split_query(checkpoint_id)[0])
        return FsspecWriter(
            checkpoint_id, **{**_of_query(checkpoint_id, ShardedWriter.OPTIONS), **options}
        )

    def reader(self, checkpoint_id: CheckpointId, **options: Any) -> StorageReader:
        """A ``FsspecReader``, with its keywords; see ``writer``."""
        require_known(split_query(checkpoint_id)[0])
        return FsspecReader(
            checkpoint_id, **{**_of_query(checkpoint_id, ShardedReader.OPTIONS), **options}
        )


def _of_query(url: CheckpointId, names: frozenset[str]) -> dict[str, Any]:
    query = split_query(url)[1]
    return {name: value for name, value in query.items() if name in names}


backend = FsspecBackend()
"""For the entry point."""
