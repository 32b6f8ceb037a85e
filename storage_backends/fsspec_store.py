"""Any fsspec file system as a byte store.

Belongs here: the operations of a store, and its promises. Does not belong here: what users
construct (``storage_backends.fsspec``), retries (``fsspec_requests``), and the calls themselves
(``fsspec_reads``, ``fsspec_create``, ``fsspec_puts``, ``fsspec_paths``).
"""

from __future__ import annotations

import asyncio
import posixpath
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from dcp_engine.errors import StorageError
from dcp_engine.format.names import OWNER_NAME, parse_data_directory
from dcp_engine.storage import ByteStore, ByteStoreFile, ReadRange, StoredFile
from storage_backends.fsspec_create import create_file
from storage_backends.fsspec_open import FileSystems
from storage_backends.fsspec_paths import (
    Entry,
    is_directory,
    list_objects,
    list_tree,
    make_directories,
    remove_directory,
    remove_file,
)
from storage_backends.fsspec_puts import (
    Renaming,
    creates_if_absent,
    put_object,
    put_over,
    replaces_if_same,
    tag_of,
)
from storage_backends.fsspec_reads import (
    Request,
    ShortRead,
    plan_requests,
    read_in_order,
    read_together,
)
from storage_backends.fsspec_requests import Limits, Requests
from storage_backends.names import split_name

__all__ = ["FsspecByteStore", "Limits"]

T = TypeVar("T")

READERS = 4
"""Calls of ``read`` at a time that the store is made for; ``FsspecReader`` makes as many."""


class FsspecByteStore(ByteStore):
    """A directory, or a key prefix, of a file system.

    Args:
        filesystems: what ``open_filesystems`` made; closed with the store.
        limits: how hard to work.
    """

    random_write = False
    atomic_replace = False  # ``put`` is: on an object store by itself, on a file server by renaming
    durable_sync = False

    def __init__(self, filesystems: FileSystems, limits: Limits | None = None) -> None:
        requests = Requests(filesystems, limits if limits is not None else Limits())
        self._fs = filesystems
        self._requests = requests
        self._root = filesystems.path
        # All readers together have all streams at work, each with as many requests. They even out
        # what they ask for, by up to a quarter: that must not make another request.
        at_once = max(1, -(-requests.streams // READERS)) if filesystems.is_async else 3
        self.preferred_read = at_once * requests.request_bytes * 4 // 5
        self.create_if_absent = creates_if_absent(filesystems.kind, filesystems.traits)
        self.replace_if_same = replaces_if_same(filesystems.kind)
        self.shared_between_processes = filesystems.traits.shared
        self._pool = ThreadPoolExecutor(requests.streams, thread_name_prefix="dcp_engine-fsspec")
        self._reading = asyncio.Semaphore(requests.streams)
        self._scratch: str | None = None
        self._clock: float | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._fs.url

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._fs.close()

    def _path(self, name: str) -> str:
        parts = split_name(name, store=self.url)
        return "/".join([self._root, *parts]) if self._root else "/".join(parts)

    def _require_writable(self, name: str) -> None:
        if not self._fs.traits.writable:
            raise StorageError(
                "checkpoints can be read from this storage, not written to it",
                kind="unsupported_storage",
                checkpoint=self.url,
                file=name,
                hint="save to another storage",
            )

    # Writing

    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        self._require_writable(name)
        return create_file(self._requests, name, self._path(name), size, self._pool)

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self._require_writable(name)
        path = self._path(name)
        if not self._fs.traits.whole_puts:
            self._put_by_renaming(name, path, data, if_absent)
            return
        absent = if_absent and self.create_if_absent
        call = self._requests.on(partial(put_object, path=path, data=data, if_absent=absent))
        self._requests.make_write(name, "store the object", call)

    def tag(self, name: str) -> str:
        call = self._requests.on(partial(tag_of, path=self._path(name)))
        return self._requests.make(name, "look at the object", call)

    def put_over(self, name: str, data: bytes, tag: str) -> None:
        call = self._requests.on(partial(put_over, path=self._path(name), data=data, tag=tag))
        self._requests.make_write(name, "replace the object", call)

    def _put_by_renaming(self, name: str, path: str, data: bytes, if_absent: bool) -> None:
        beside = posixpath.dirname(path)
        # Nothing but data directories lies beside manifests; a save has made one.
        place = (self._scratch or beside) if "/" not in name else beside
        temporary = f"{place}/.{posixpath.basename(path)}.{uuid.uuid4().hex}.tmp"
        renaming = Renaming(temporary, path, data, if_absent=if_absent and self.create_if_absent)
        try:
            self._requests.make(name, "store the object", self._requests.on(renaming.write))
        except FileNotFoundError:
            if place == beside:
                raise
            # That data directory is gone.
            self._scratch = None
            self._put_by_renaming(name, path, data, if_absent)
            return
        try:
            call = self._requests.on(renaming.take_name)
            self._requests.make(name, "store the object", call, missing=False)
        except BaseException:
            with suppress(Exception):
                self._requests.on(lambda fs: remove_file(fs, temporary))()
            raise

    def replace(self, source: str, target: str) -> None:
        raise StorageError(
            "this storage has no rename that the engine relies on",
            kind="unsupported_storage",
            checkpoint=self.url,
            file=target,
        )

    # Reading

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        path = self._path(name)
        requests = plan_requests(
            ranges, request_bytes=self._requests.request_bytes, max_gap=self._fs.traits.max_gap
        )
        if not requests:
            return
        cached = self._fs.cache is not None and _never_changes(name)
        if cached:
            with self._fs.cache_lock:
                self._read(name, requests, lambda rest: read_in_order(self._fs.cache, path, rest))
        elif self._fs.is_async:
            on = self._requests.on
            self._read(
                name,
                requests,
                lambda rest: on(lambda fs: read_together(fs, path, rest, self._reading))(),
            )
        else:
            self._read_in_threads(name, path, requests)

    def _read(
        self, name: str, requests: list[Request], call: Callable[[list[Request]], None]
    ) -> None:
        end = max(request.end for request in requests)

        def refuse_short(error: BaseException) -> None:
            # Also what servers say of a range outside of the file, each in its own words.
            if isinstance(error, FileNotFoundError | PermissionError):
                return
            size = self.size(name)
            if size < end:
                raise EOFError(f"{self.url}/{name} ends at byte {size}, before {end}") from error

        def before_next(error: BaseException) -> None:
            if isinstance(error, ShortRead | EOFError):
                refuse_short(error)

        try:
            self._requests.make(
                name, "read the file", lambda: call(requests), before_next=before_next
            )
        except StorageError as error:
            if error.kind == "io_error":
                refuse_short(error)
            raise

    def _read_in_threads(self, name: str, path: str, requests: list[Request]) -> None:
        on, streams = self._requests.on, self._requests.streams
        shares = [share for n in range(streams) if (share := requests[n::streams])]

        def read(share: list[Request]) -> None:
            self._read(name, share, lambda rest: on(lambda fs: read_in_order(fs, path, rest))())

        self._in_threads(read, shares)

    def _in_threads(self, call: Callable[[T], None], arguments: Sequence[T]) -> None:
        """Raises the first failure, when no thread uses the caller's memory any more."""
        futures = [self._pool.submit(call, argument) for argument in arguments]
        wait(futures)
        for future in futures:
            future.result()

    def get(self, name: str, *, limit: int | None = None) -> bytes:
        # One request for all of it: what is replaced meanwhile stays one object.
        path = self._path(name)
        most = sys.maxsize - 1 if limit is None else limit
        bounded = self._requests.is_of("s3fs.core")
        if limit is not None and not bounded:
            _refuse_larger(name, self.size(name), limit)
        read = partial(_at_most, end=most + 1) if bounded else _whole
        data = self._requests.make(
            name, "read the file", self._requests.on(lambda fs: read(fs, path))
        )
        _refuse_larger(name, len(data), most)
        return data

    def size(self, name: str) -> int:
        path = self._path(name)

        def look(fs: Any) -> int:
            info = fs.info(path)
            if info["type"] == "directory":
                raise FileNotFoundError(path)
            return int(info["size"])

        return self._requests.make(name, "look at the file", self._requests.on(look))

    # Directories and listings

    def make_directory(self, name: str) -> None:
        self._require_writable(name)
        if not self._fs.traits.directories:
            split_name(name, store=self.url)
            return
        path = self._path(name)
        self._requests.make(
            name, "create the directory", self._requests.on(lambda fs: make_directories(fs, path))
        )
        if name:
            self._scratch = self._path(name.partition("/")[0])

    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        head, _, tail = prefix.rpartition("/")
        path = self._path(head)
        walk = list_tree if self._fs.traits.directories else list_objects
        entries: list[Entry] = self._requests.make(
            prefix, "list", self._requests.on(lambda fs: list(walk(fs, path, tail)))
        )
        dated = [entry.path for entry in entries if entry.changed is not None]
        now = self._now(posixpath.dirname(dated[0]), prefix) if dated else 0.0
        skip = len(self._root.strip("/")) + 1 if self._root.strip("/") else 0
        return [
            StoredFile(
                entry.path.lstrip("/")[skip:],
                entry.size,
                None if entry.changed is None else max(0.0, now - entry.changed),
            )
            for entry in entries
        ]

    def _now(self, directory: str, prefix: str) -> float:
        """The time by the clock that stamps files here. Object stores refuse requests of hosts
        whose clocks are far from theirs; a file server is asked, once, by a file in ``directory``,
        where anybody may look at ages: those of manifests say nothing."""
        if not self._fs.traits.directories or prefix.startswith("manifest"):
            return time.time()
        with self._lock:
            if self._clock is None:
                self._clock = self._clock_difference(directory)
            return time.time() + self._clock

    def _clock_difference(self, directory: str) -> float:
        path = f"{directory}/.{uuid.uuid4().hex}.tmp"

        def probe(fs: Any) -> float:
            with fs.open(path, "wb"):
                pass
            try:
                changed = next(
                    (e.changed for e in list_tree(fs, *posixpath.split(path)) if e.changed), None
                )
            finally:
                remove_file(fs, path)
            return 0.0 if changed is None else changed - time.time()

        try:
            return self._requests.on(probe)()
        except Exception:
            return 0.0  # not writable: the host's clock it is

    def delete(self, names: Iterable[str]) -> None:
        paths = [
            (name, self._path(name.removesuffix("/"))) for name in dict.fromkeys(names) if name
        ]
        self._require_writable(paths[0][0] if paths else "")
        # The last name goes last: that of a record that explains the others.
        for group in (paths[:-1], paths[-1:]):
            self._in_threads(lambda each: self._delete_one(*each), group)
        if self._fs.traits.directories:
            self._remove_parents([path for _, path in paths])

    def _delete_one(self, name: str, path: str) -> None:
        has_directories = self._fs.traits.directories
        if name.endswith("/") and not has_directories:
            return

        def remove(fs: Any) -> None:
            try:
                remove_file(fs, path)
            except Exception:
                if not (has_directories and is_directory(fs, path)):
                    raise
                remove_directory(fs, path)

        self._requests.make(name, "remove the file", self._requests.on(remove), missing=False)

    def _remove_parents(self, paths: Sequence[str]) -> None:
        """Remove the directories of ``paths`` that are empty now, inner ones first."""
        parents = {posixpath.dirname(path) for path in paths}
        while parents:
            deepest = max(parents, key=lambda path: path.count("/"))
            parents.remove(deepest)
            if len(deepest) <= len(self._root):
                continue
            call = self._requests.on(partial(remove_directory, path=deepest))
            if self._requests.make(deepest[len(self._root) + 1 :], "remove the directory", call):
                parents.add(posixpath.dirname(deepest))

    def sync_directory(self, name: str) -> None:
        split_name(name, store=self.url)


def _never_changes(name: str) -> bool:
    """Whether the file, once there, stays as it is: so it may be read from a cache."""
    directory, slash, rest = name.partition("/")
    return bool(slash) and parse_data_directory(directory) is not None and rest != OWNER_NAME


def _refuse_larger(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{name} holds {size} bytes, and {limit} were expected at most")


def _at_most(fs: Any, path: str, end: int) -> bytes:
    """The content as far as byte ``end``. s3fs looks at the size before it reads all of an object,
    and reads a large one in pieces, which may then be of two objects."""
    try:
        return bytes(fs.cat_file(path, start=0, end=end))
    except OSError as error:
        # Of an empty object there is no range.
        if isinstance(error, FileNotFoundError) or fs.info(path)["size"]:
            raise
        return b""


def _whole(fs: Any, path: str) -> bytes:
    if type(fs).__module__ == "fsspec.implementations.memory":
        file = fs.store.get(fs._strip_protocol(path))
        if file is None:
            raise FileNotFoundError(path)
        return bytes(file.getvalue())
    if fs.async_impl:
        return bytes(fs.cat_file(path))
    with fs.open(path, "rb") as file:
        return bytes(file.read())
