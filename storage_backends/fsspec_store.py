"""Any fsspec file system as a byte store.

Belongs here: the store's promises, retries around every request, and errors. Does not belong
here: what users construct (``storage_backends.fsspec``), and the requests themselves
(``fsspec_reads``, ``fsspec_writes``, ``fsspec_paths``).
"""

from __future__ import annotations

import posixpath
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from dcp_engine.errors import StorageError, UsageError
from dcp_engine.format.names import OWNER_NAME, parse_data_directory
from dcp_engine.storage import ByteStore, ByteStoreFile, ReadRange, StoredFile
from storage_backends.fsspec_errors import storage_calls
from storage_backends.fsspec_open import FileSystems
from storage_backends.fsspec_parts import OffsetSink, S3Sink, s3_part_bytes
from storage_backends.fsspec_paths import (
    Entry,
    is_directory,
    list_objects,
    list_tree,
    make_directories,
    remove_directory,
    remove_file,
)
from storage_backends.fsspec_puts import Renaming, creates_if_absent, put_object
from storage_backends.fsspec_reads import (
    Request,
    ShortRead,
    plan_requests,
    read_in_order,
    read_together,
)
from storage_backends.fsspec_writes import PartsFile, PartSink, StreamFile
from storage_backends.names import split_name
from storage_backends.retry import RetryPolicy

__all__ = ["FsspecByteStore", "Limits"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How hard a store may work. What is None is chosen by the kind of file system."""

    streams: int | None = None
    """Requests at a time."""
    part_bytes: int | None = None
    """Bytes of one request that writes, 5 MiB at least on S3."""
    request_bytes: int | None = None
    """Most bytes of one request that reads."""
    max_inflight_bytes: int = 256 << 20
    """Bound of the parts of files being written that are held in memory."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)


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
        limits = limits if limits is not None else Limits()
        traits = filesystems.traits
        self._fs = filesystems
        self._root = filesystems.path
        self._retry = limits.retry
        self._streams = limits.streams or traits.streams
        self._request_bytes = limits.request_bytes or traits.request_bytes
        self._part_bytes = limits.part_bytes or traits.part_bytes
        # Several requests at once for each thread that reads.
        self.preferred_read = 3 * self._request_bytes
        if min(self._streams, self._request_bytes, self._part_bytes) < 1:
            raise UsageError("streams, part_bytes and request_bytes are positive numbers")
        self._part_bytes = min(self._part_bytes, max(1, limits.max_inflight_bytes // 2))
        self._max_inflight = limits.max_inflight_bytes
        self.create_if_absent = creates_if_absent(filesystems.kind, traits)
        self.shared_between_processes = traits.shared
        self._pool = ThreadPoolExecutor(self._streams, thread_name_prefix="dcp_engine-fsspec")
        self._scratch: str | None = None
        self._clock: float | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._fs.url

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._fs.close()

    # Names, retries, errors

    def _path(self, name: str) -> str:
        parts = split_name(name, store=self.url)
        return "/".join([self._root, *parts]) if self._root else "/".join(parts)

    def _is_of(self, *modules: str) -> bool:
        return self._fs.kind.__module__ in modules

    def _guard(
        self,
        name: str,
        action: str,
        call: Callable[[], T],
        *,
        missing: bool = True,
        policy: RetryPolicy | None = None,
        before_next: Callable[[BaseException], None] | None = None,
    ) -> T:
        """The result of ``call``, tried again where that helps; errors are a byte store's."""
        secrets = self._fs.secrets
        with storage_calls(
            action, secrets=secrets, checkpoint=self.url, file=name, missing=missing
        ):
            return (policy or self._retry).call(
                call,
                what=f"{action} {self.url}/{name}",
                scrub=secrets.scrub,
                before_next=before_next,
            )

    def _leased(self, call: Callable[[Any], T]) -> Callable[[], T]:
        def run() -> T:
            with self._fs.lease() as fs:
                return call(fs)

        return run

    def _require_writable(self, name: str) -> None:
        if not self._fs.traits.writable:
            raise StorageError(
                "checkpoints can be read from this storage, not written to it",
                kind="unsupported_storage",
                checkpoint=self.url,
                file=name,
                hint="save to another storage",
            )

    # Files being written

    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        self._require_writable(name)
        path = self._path(name)
        guard = partial(self._guard_write, name)
        if self._is_of("s3fs.core", "s3fs"):
            with self._fs.lease() as fs:  # serves all threads
                return self._parts(name, S3Sink(fs, path), s3_part_bytes(size, self._part_bytes))
        if self._is_of("fsspec.implementations.sftp", "fsspec.implementations.local"):
            self._create_empty(name, path)
            return self._parts(name, OffsetSink(self._fs.lease, path), self._part_bytes)
        lease = self._fs.lease()
        fs = lease.__enter__()
        try:
            file = guard("create the file", lambda: self._open_stream(fs, path))
        except BaseException:
            lease.__exit__(None, None, None)
            raise
        return StreamFile(
            self.url,
            name,
            file,
            remove=lambda: remove_file(fs, path),
            guard=partial(guard, policy=RetryPolicy(attempts=1)),
            release=lambda: _leave(lease),
        )

    def _guard_write(
        self, name: str, action: str, call: Callable[[], T], policy: RetryPolicy | None = None
    ) -> T:
        # Of an object store only the bucket can be missing.
        missing = self._fs.traits.directories
        return self._guard(name, action, call, missing=missing, policy=policy)

    def _parts(self, name: str, sink: PartSink, part_bytes: int) -> PartsFile:
        slots = max(1, min(self._streams, self._max_inflight // part_bytes - 1))
        return PartsFile(
            self.url,
            name,
            sink,
            part_bytes=part_bytes,
            slots=slots,
            pool=self._pool,
            guard=partial(self._guard_write, name),
        )

    def _create_empty(self, name: str, path: str) -> None:
        """An empty file that was not there. Of a second attempt it may be the first one's."""
        modes = iter(["wxb" if self._is_of("fsspec.implementations.sftp") else "xb"])

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

        self._guard(name, "create the file", self._leased(create))

    def _open_stream(self, fs: Any, path: str) -> Any:
        if self._is_of("obstore.fsspec"):
            return fs.open(path, "wb", buffer_size=self._part_bytes)
        return fs.open(path, "wb", block_size=self._part_bytes)

    # Small objects

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self._require_writable(name)
        path = self._path(name)
        if not self._fs.traits.whole_puts:
            self._put_by_renaming(name, path, data, if_absent)
            return
        absent = if_absent and self.create_if_absent
        call = self._leased(partial(put_object, path=path, data=data, if_absent=absent))
        self._guard_write(name, "store the object", call)

    def _put_by_renaming(self, name: str, path: str, data: bytes, if_absent: bool) -> None:
        beside = posixpath.dirname(path)
        # Nothing but data directories lies beside manifests; a save has made one.
        place = (self._scratch or beside) if "/" not in name else beside
        temporary = f"{place}/.{posixpath.basename(path)}.{uuid.uuid4().hex}.tmp"
        renaming = Renaming(temporary, path, data, if_absent=if_absent and self.create_if_absent)
        try:
            self._guard(name, "store the object", self._leased(renaming.write))
        except FileNotFoundError:
            if place == beside:
                raise
            # That data directory is gone.
            self._scratch = None
            self._put_by_renaming(name, path, data, if_absent)
            return
        try:
            call = self._leased(renaming.take_name)
            self._guard(name, "store the object", call, missing=False)
        except BaseException:
            with suppress(Exception):
                self._leased(lambda fs: remove_file(fs, temporary))()
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
            ranges, request_bytes=self._request_bytes, max_gap=self._fs.traits.max_gap
        )
        if not requests:
            return
        cached = self._fs.cache is not None and _never_changes(name)
        if cached:
            with self._fs.cache_lock:
                self._read(name, requests, lambda rest: read_in_order(self._fs.cache, path, rest))
        elif self._fs.is_async:
            fs_call = self._leased
            self._read(
                name,
                requests,
                lambda rest: fs_call(lambda fs: read_together(fs, path, rest, self._streams))(),
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
            self._guard(name, "read the file", lambda: call(requests), before_next=before_next)
        except StorageError as error:
            if error.kind == "io_error":
                refuse_short(error)
            raise

    def _read_in_threads(self, name: str, path: str, requests: list[Request]) -> None:
        shares = [share for n in range(self._streams) if (share := requests[n :: self._streams])]

        def read(share: list[Request]) -> None:
            self._read(
                name, share, lambda rest: self._leased(lambda fs: read_in_order(fs, path, rest))()
            )

        if len(shares) == 1:
            read(shares[0])
            return
        for future in [self._pool.submit(read, share) for share in shares]:
            future.result()

    def get(self, name: str, *, limit: int | None = None) -> bytes:
        # One request for all of it: what is replaced meanwhile stays one object.
        size = self.size(name)
        if limit is not None and size > limit:
            raise ValueError(f"{name} holds {size} bytes, more than the {limit} expected at most")
        path = self._path(name)
        data = self._guard(name, "read the file", self._leased(lambda fs: _whole(fs, path)))
        if limit is not None and len(data) > limit:
            raise ValueError(f"{name} holds {len(data)} bytes, more than {limit}")
        return data

    def size(self, name: str) -> int:
        path = self._path(name)

        def look(fs: Any) -> int:
            info = fs.info(path)
            if info["type"] == "directory":
                raise FileNotFoundError(path)
            return int(info["size"])

        return self._guard(name, "look at the file", self._leased(look))

    # Directories and listings

    def make_directory(self, name: str) -> None:
        self._require_writable(name)
        if not self._fs.traits.directories:
            split_name(name, store=self.url)
            return
        path = self._path(name)
        self._guard(
            name, "create the directory", self._leased(lambda fs: make_directories(fs, path))
        )
        if name:
            self._scratch = self._path(name.partition("/")[0])

    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        head, _, tail = prefix.rpartition("/")
        path = self._path(head)
        walk = list_tree if self._fs.traits.directories else list_objects
        entries: list[Entry] = self._guard(
            prefix, "list", self._leased(lambda fs: list(walk(fs, path, tail)))
        )
        now = self._now() if any(entry.changed is not None for entry in entries) else 0.0
        skip = len(self._root.strip("/")) + 1 if self._root.strip("/") else 0
        return [
            StoredFile(
                entry.path.lstrip("/")[skip:],
                entry.size,
                None if entry.changed is None else max(0.0, now - entry.changed),
            )
            for entry in entries
        ]

    def _now(self) -> float:
        """The time by the clock that stamps files here. Object stores refuse requests of hosts
        whose clocks are far from theirs; a file server is asked, once, by a file."""
        if not self._fs.traits.directories or not self._fs.traits.writable:
            return time.time()
        with self._lock:
            if self._clock is None:
                self._clock = self._clock_difference()
            return time.time() + self._clock

    def _clock_difference(self) -> float:
        path = f"{self._scratch or self._root}/.{uuid.uuid4().hex}.tmp"

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
            return self._leased(probe)()
        except Exception:
            return 0.0  # not writable: the host's clock it is

    def delete(self, names: Iterable[str]) -> None:
        paths = [
            (name, self._path(name.removesuffix("/"))) for name in dict.fromkeys(names) if name
        ]
        self._require_writable(paths[0][0] if paths else "")
        # The last name goes last: that of a record that explains the others.
        first, last = paths[:-1], paths[-1:]
        for group in (first, last):
            for future in [self._pool.submit(self._delete_one, *each) for each in group]:
                future.result()
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

        self._guard(name, "remove the file", self._leased(remove), missing=False)

    def _remove_parents(self, paths: Sequence[str]) -> None:
        """Remove the directories of ``paths`` that are empty now, inner ones first."""
        parents = {posixpath.dirname(path) for path in paths}
        while parents:
            deepest = max(parents, key=lambda path: path.count("/"))
            parents.remove(deepest)
            if len(deepest) <= len(self._root):
                continue
            call = self._leased(partial(remove_directory, path=deepest))
            if self._guard(deepest[len(self._root) + 1 :], "remove the directory", call):
                parents.add(posixpath.dirname(deepest))

    def sync_directory(self, name: str) -> None:
        split_name(name, store=self.url)


def _leave(lease: AbstractContextManager[Any]) -> None:
    lease.__exit__(None, None, None)


def _never_changes(name: str) -> bool:
    """Whether the file, once there, stays as it is: so it may be read from a cache."""
    directory, slash, rest = name.partition("/")
    return bool(slash) and parse_data_directory(directory) is not None and rest != OWNER_NAME


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
