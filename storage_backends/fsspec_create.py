"""New files on fsspec's file systems: which kind of file suits which of them.

Belongs here: the choice, and opening. Does not belong here: what goes on in an open file
(``fsspec_writes``, ``fsspec_parts``).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from dcp_engine.storage import ByteStoreFile
from storage_backends.fsspec_parts import OffsetSink, S3Sink, s3_part_bytes
from storage_backends.fsspec_paths import remove_file
from storage_backends.fsspec_requests import Requests
from storage_backends.fsspec_writes import PartsFile, PartSink, StreamFile
from storage_backends.retry import RetryPolicy

__all__ = ["create_file"]


def create_file(
    requests: Requests, name: str, path: str, size: int | None, pool: ThreadPoolExecutor
) -> ByteStoreFile:
    """Begin file ``name`` at ``path``; ``pool`` sends its parts, where it has some."""
    part_bytes = requests.part_bytes
    if requests.is_of("s3fs.core"):
        with requests.filesystems.lease() as fs:  # it serves all threads
            return _parts(requests, name, S3Sink(fs, path), s3_part_bytes(size, part_bytes), pool)
    if requests.is_of("fsspec.implementations.sftp", "fsspec.implementations.local"):
        _create_empty(requests, name, path)
        sink = OffsetSink(requests.filesystems.lease, path)
        return _parts(requests, name, sink, part_bytes, pool)
    return _stream(requests, name, path)


def _parts(
    requests: Requests, name: str, sink: PartSink, part_bytes: int, pool: ThreadPoolExecutor
) -> PartsFile:
    slots = max(1, min(requests.streams, requests.max_inflight_bytes // part_bytes - 1))
    return PartsFile(
        requests.url,
        name,
        sink,
        part_bytes=part_bytes,
        slots=slots,
        pool=pool,
        guard=partial(requests.make_write, name),
    )


def _create_empty(requests: Requests, name: str, path: str) -> None:
    """An empty file that was not there. Of a second attempt it may be the first one's."""
    modes = iter(["wxb" if requests.is_of("fsspec.implementations.sftp") else "xb"])

    def create(fs: Any) -> None:
        mode = next(modes, "wb")
        try:
            fs.open(path, mode).close()
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            if mode != "wb" and fs.exists(path):  # SFTP has no word for it
                raise FileExistsError(path) from error
            raise

    requests.make(name, "create the file", requests.on(create))


def _stream(requests: Requests, name: str, path: str) -> StreamFile:
    size_option = "buffer_size" if requests.is_of("obstore.fsspec") else "block_size"
    options = {size_option: requests.part_bytes}
    lease = requests.filesystems.lease()
    fs = lease.__enter__()
    try:
        open_it: Callable[[], Any] = partial(fs.open, path, "wb", **options)
        file = requests.make_write(name, "create the file", open_it)
    except BaseException:
        _leave(lease)
        raise
    return StreamFile(
        requests.url,
        name,
        file,
        remove=partial(remove_file, fs, path),
        guard=partial(requests.make_write, name, policy=RetryPolicy(attempts=1)),
        release=partial(_leave, lease),
    )


def _leave(lease: AbstractContextManager[Any]) -> None:
    lease.__exit__(None, None, None)
