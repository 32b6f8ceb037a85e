"""The local (or mounted) file system as a byte store.

Belongs here: POSIX calls, durability and safety of paths. Does not belong here: the layout of a
checkpoint (``sharded_writer``, ``sharded_reader``), and what users construct (``filesystem``).

No path below the root is ever followed through a symbolic link: every part is opened with
``O_NOFOLLOW`` relative to its parent's descriptor, so that a link put into a checkpoint cannot
point a reader, or a clean-up, elsewhere. The root itself may be reached through links.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import unquote, urlsplit

from dcp_engine.errors import DamagedCheckpointError, StorageError, UsageError
from dcp_engine.redaction import redact_url
from dcp_engine.registry import scheme_of
from dcp_engine.storage import ByteStore, ByteStoreFile, ReadRange, StoredFile
from storage_backends.directory_entries import (
    DIRECTORY_FLAGS,
    Entry,
    remove,
    remove_empty_directory,
    walk,
)
from storage_backends.filesystem_file import FileSystemFile
from storage_backends.names import split_name
from storage_backends.os_errors import storage_error, storage_errors
from storage_backends.vectored_io import pread_all, pread_ranges, pwrite_all

__all__ = ["FileSystemStore", "path_of"]

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that somebody put there must not wait for a writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_DIRECTORY_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


def path_of(checkpoint_id: str | os.PathLike[str]) -> str:
    """The absolute path of a plain path or a ``file:`` URL.

    Raises ``UsageError`` for another URL: it would be a directory called "s3:" and the like.
    """
    text = os.fspath(checkpoint_id)
    if scheme_of(checkpoint_id) != "file":
        raise UsageError(
            f"{redact_url(text)!r} is a URL of another storage than the file system",
            checkpoint=text,
            hint="pass it as checkpoint_id without a writer or reader, or use that storage's own",
        )
    if text.startswith("file:"):
        text = unquote(urlsplit(text).path)
    return os.path.abspath(text)


class FileSystemStore(ByteStore):
    """A directory.

    Args:
        root: its path; need not exist before ``make_directory``.
        sync: False makes every ``fsync`` a no-op (``durable_sync`` is then false): a power
            failure may lose what was written, a crash of the process does not.
    """

    random_write = True
    concurrent_writes = False  # the kernel's lock of a file lets one in at a time
    atomic_replace = True
    create_if_absent = True
    shared_between_processes = True

    def __init__(self, root: str | os.PathLike[str], *, sync: bool = True) -> None:
        self._root = path_of(root)
        self.durable_sync = sync

    @property
    def url(self) -> str:
        return self._root

    def local_path(self, name: str) -> str | None:
        return "/".join([self._root, *split_name(name, store=self.url)])

    # Directories

    @contextmanager
    def _directory(self, parts: Sequence[str], name: str) -> Iterator[int]:
        """A descriptor of the directory ``parts`` below the root."""
        descriptor = os.open(self._root, DIRECTORY_FLAGS)
        try:
            for part in parts:
                try:
                    inner = os.open(part, DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
                except OSError as error:
                    self._refuse_link(part, descriptor, name, error)
                    raise
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _parent(self, name: str) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory that holds ``name``, and the last part of ``name``."""
        parts = split_name(name, store=self.url)
        if not parts:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._root)
        with self._directory(parts[:-1], name) as descriptor:
            yield descriptor, parts[-1]

    def _refuse_link(self, part: str, directory: int, name: str, error: OSError) -> None:
        """Raise ``unsafe_path`` if ``part``, which could not be opened, is a symbolic link."""
        if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
            return
        if stat.S_ISLNK(os.stat(part, dir_fd=directory, follow_symlinks=False).st_mode):
            raise self._unsafe("a symbolic link", name) from error

    def _unsafe(self, what: str, name: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"{what} lies where a file of the checkpoint should be, and is not followed",
            kind="unsafe_path",
            checkpoint=self.url,
            file=name,
            hint="put the file itself there, or take another checkpoint",
        )

    def make_directory(self, name: str) -> None:
        with storage_errors("create the directory", checkpoint=self.url, file=name):
            try:
                self._make_root()
            except FileNotFoundError as error:
                # A link to nowhere, or a pseudo file system: nobody removed anything.
                raise storage_error(
                    error, "create the directory", checkpoint=self.url, file=name
                ) from error
            parts = split_name(name, store=self.url)
            for depth, part in enumerate(parts):
                with self._directory(parts[:depth], name) as parent:
                    try:
                        os.mkdir(part, dir_fd=parent)
                    except FileExistsError:
                        continue
                    self._sync_descriptor(parent)
            with self._directory(parts, name):
                return

    def _make_root(self) -> None:
        missing = []
        path = self._root
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        if missing:
            # Another save may have made ``path`` this moment, and not its name durable yet.
            with suppress(PermissionError):
                self._sync_path(os.path.dirname(path))
        for path in reversed(missing):
            # Another rank may be faster; a file in the way is the error it should be.
            with suppress(FileExistsError):
                os.mkdir(path)
            self._sync_path(os.path.dirname(path))
        os.stat(self._root)

    def _sync_path(self, path: str) -> None:
        if not self.durable_sync:
            return
        descriptor = os.open(path, DIRECTORY_FLAGS)
        try:
            self._sync_descriptor(descriptor)
        finally:
            os.close(descriptor)

    def _sync_descriptor(self, descriptor: int) -> None:
        if not self.durable_sync:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network and FUSE file systems have no fsync for directories: their entries
            # are as durable as they get.
            is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            if not (is_directory and error.errno in _NO_DIRECTORY_SYNC):
                raise

    def sync_directory(self, name: str) -> None:
        with storage_errors("make the directory durable", checkpoint=self.url, file=name):
            if not self.durable_sync:
                return
            with self._directory(split_name(name, store=self.url), name) as descriptor:
                self._sync_descriptor(descriptor)
            if name == "":
                # An earlier save may have died between creating the root and making its entry
                # durable. Where the parent may not be opened, we cannot have created the root.
                with suppress(PermissionError):
                    self._sync_path(os.path.dirname(self._root))

    # Files

    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        # No preallocation from ``size``: on tmpfs it would touch every page twice.
        with (
            storage_errors("create the file", checkpoint=self.url, file=name),
            self._parent(name) as (directory, last),
        ):
            descriptor = os.open(last, _NEW_FILE, 0o666, dir_fd=directory)
        return FileSystemFile(self, name, descriptor, size)

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        with (
            storage_errors("write the file", checkpoint=self.url, file=name),
            self._parent(name) as (directory, last),
        ):
            temporary = f"{last}.{uuid.uuid4().hex}.tmp"
            descriptor = os.open(temporary, _NEW_FILE, 0o666, dir_fd=directory)
            renamed = False
            try:
                try:
                    pwrite_all(descriptor, [memoryview(data)], 0)
                    self._sync_descriptor(descriptor)
                finally:
                    os.close(descriptor)
                if if_absent:
                    self._link(temporary, last, directory, name)
                else:
                    os.replace(temporary, last, src_dir_fd=directory, dst_dir_fd=directory)
                    renamed = True
            finally:
                if not renamed:
                    with suppress(FileNotFoundError):
                        os.unlink(temporary, dir_fd=directory)
            self._sync_descriptor(directory)

    def _link(self, temporary: str, last: str, directory: int, name: str) -> None:
        """Give the temporary file its name unless that name is taken: of several, one wins."""
        try:
            os.link(
                temporary, last, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False
            )
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise StorageError(
                "this file system has no hard links, so a file cannot be created by one of "
                "several writers only",
                kind="unsupported_storage",
                checkpoint=self.url,
                file=name,
            ) from error

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, int]]:
        """A regular file opened for reading: descriptor and size."""
        with self._parent(name) as (directory, last):
            try:
                descriptor = os.open(last, _READ, dir_fd=directory)
            except OSError as error:
                self._refuse_link(last, directory, name, error)
                raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self._unsafe("something that is not a regular file", name)
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        with (
            storage_errors("read the file", checkpoint=self.url, file=name),
            self._opened(name) as (descriptor, _size),
        ):
            self._read_ranges(descriptor, name, ranges)

    @contextmanager
    def opened(self, name: str) -> Iterator[Callable[[Sequence[ReadRange]], None]]:
        with ExitStack() as stack:
            with storage_errors("open the file", checkpoint=self.url, file=name):
                descriptor, _ = stack.enter_context(self._opened(name))

            def read(ranges: Sequence[ReadRange]) -> None:
                with storage_errors("read the file", checkpoint=self.url, file=name):
                    self._read_ranges(descriptor, name, ranges)

            yield read

    def _read_ranges(self, descriptor: int, name: str, ranges: Sequence[ReadRange]) -> None:
        try:
            pread_ranges(descriptor, ranges)
        except EOFError as error:
            raise EOFError(f"{self.url}/{name}: {error}") from error

    def get(self, name: str, *, limit: int | None = None) -> bytes:
        # One descriptor for size and content: a file that is replaced meanwhile stays one file.
        with (
            storage_errors("read the file", checkpoint=self.url, file=name),
            self._opened(name) as (descriptor, size),
        ):
            if limit is not None and size > limit:
                raise ValueError(f"{name} holds {size} bytes, expected are at most {limit}")
            data = bytearray(size)
            pread_all(descriptor, [memoryview(data)], 0)
            return bytes(data)

    def size(self, name: str) -> int:
        with (
            storage_errors("look at the file", checkpoint=self.url, file=name),
            self._opened(name) as (_descriptor, size),
        ):
            return size

    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        with storage_errors("list the directory", checkpoint=self.url, file=prefix):
            head, _, tail = prefix.rpartition("/")
            parts = split_name(head, store=self.url)
            found: list[Entry] = []
            try:
                with self._directory(parts, prefix) as descriptor:
                    walk(descriptor, head, tail, found)
                    now = self._now(descriptor) if found else 0.0
            except FileNotFoundError:
                return []
            return [
                StoredFile(f.name, f.size, max(0.0, now - f.changed), f.unreadable) for f in found
            ]

    def _now(self, directory: int) -> float:
        """The time by the clock that stamps files here: that of the server, if there is one."""
        try:
            descriptor = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            # Not writable, or a file system without unnamed files: the host's clock it is.
            return time.time()
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)

    def replace(self, source: str, target: str) -> None:
        with (
            storage_errors("rename the file", checkpoint=self.url, file=target),
            self._parent(source) as (source_directory, source_last),
            self._parent(target) as (target_directory, target_last),
        ):
            os.replace(
                source_last,
                target_last,
                src_dir_fd=source_directory,
                dst_dir_fd=target_directory,
            )

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with storage_errors("remove the file", checkpoint=self.url, file=name):
                self._delete_one(name)

    def _delete_one(self, name: str) -> None:
        parts = split_name(name.removesuffix("/"), store=self.url)
        if not parts:
            return
        try:
            with self._directory(parts[:-1], name) as directory:
                remove(parts[-1], directory)
            for depth in range(len(parts) - 1, 0, -1):
                with self._directory(parts[: depth - 1], name) as directory:
                    if not remove_empty_directory(parts[depth - 1], directory):
                        return
        except FileNotFoundError:
            return
