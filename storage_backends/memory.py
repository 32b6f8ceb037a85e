"""A byte store in this process's memory, for tests and notebooks.

Belongs here: the store and its backend. Does not belong here: anything about checkpoints.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcp_engine.errors import StorageError
from dcp_engine.storage import Buffer, ByteStore, ByteStoreFile, ReadRange, StoredFile
from storage_backends.names import split_name
from storage_backends.sharded_backend import ShardedBackend

__all__ = ["MemoryBackend", "MemoryStore"]


@dataclass(eq=False)
class _Content:
    data: bytearray
    changed: float = field(default_factory=time.monotonic)
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)


class MemoryStore(ByteStore):
    """Files and directories as dictionaries. Gone with the process, seen by no other one."""

    random_write = True
    atomic_replace = True
    create_if_absent = True
    replace_if_same = True
    durable_sync = False
    shared_between_processes = False

    def __init__(self, url: str = "memory://") -> None:
        self._url = url
        self._lock = threading.Lock()
        self._files: dict[str, _Content] = {}
        self._directories: dict[str, float] = {}

    @property
    def url(self) -> str:
        return self._url

    def make_directory(self, name: str) -> None:
        parts = split_name(name, store=self.url)
        with self._lock:
            for depth in range(len(parts) + 1):
                path = "/".join(parts[:depth])
                if path in self._files:
                    raise StorageError(
                        "could not create the directory: a file has its name",
                        checkpoint=self.url,
                        file=path,
                    )
                self._directories.setdefault(path, time.monotonic())

    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        content = _Content(bytearray())
        self._insert(name, content, if_absent=True)
        return _MemoryFile(self, name, content)

    def _insert(self, name: str, content: _Content, *, if_absent: bool) -> None:
        parts = split_name(name, store=self.url)
        with self._lock:
            if "/".join(parts[:-1]) not in self._directories:
                raise self._missing(name)
            if if_absent and name in self._files:
                raise self._exists(name)
            self._files[name] = content

    def _exists(self, name: str) -> FileExistsError:
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.url}/{name}")

    def _missing(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{name}")

    def _content(self, name: str) -> _Content:
        split_name(name, store=self.url)
        with self._lock:
            content = self._files.get(name)
        if content is None:
            raise self._missing(name)
        return content

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self._insert(name, _Content(bytearray(data)), if_absent=if_absent)

    def tag(self, name: str) -> str:
        return self._content(name).tag

    def put_over(self, name: str, data: bytes, tag: str) -> None:
        split_name(name, store=self.url)
        with self._lock:
            content = self._files.get(name)
            if content is None or content.tag != tag:
                raise self._exists(name)
            self._files[name] = _Content(bytearray(data))

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        content = memoryview(self._content(name).data)
        for item in ranges:
            end = item.offset + item.buffer.nbytes
            if end > content.nbytes:
                raise EOFError(f"{self.url}/{name} ends before byte {end}")
            item.buffer[:] = content[item.offset : end]

    def size(self, name: str) -> int:
        return len(self._content(name).data)

    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        now = time.monotonic()
        with self._lock:
            files = dict(self._files)
            directories = dict(self._directories)
        found = [
            StoredFile(name, len(content.data), now - content.changed)
            for name, content in files.items()
        ]
        found += [
            StoredFile(f"{name}/", 0, now - made)
            for name, made in directories.items()
            if name and not any(other.startswith(f"{name}/") for other in (*files, *directories))
        ]
        return [item for item in found if item.name.startswith(prefix)]

    def replace(self, source: str, target: str) -> None:
        content = self._content(source)
        self._insert(target, content, if_absent=False)
        with self._lock:
            self._files.pop(source, None)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            parts = split_name(name.removesuffix("/"), store=self.url)
            with self._lock:
                self._files.pop("/".join(parts), None)
                for depth in range(len(parts), 0, -1):
                    path = "/".join(parts[:depth])
                    below = f"{path}/"
                    if any(n.startswith(below) for n in (*self._files, *self._directories)):
                        break
                    self._directories.pop(path, None)

    def sync_directory(self, name: str) -> None:
        split_name(name, store=self.url)


class _MemoryFile(ByteStoreFile):
    """Grows in place. A new ``bytearray`` replaces the old one when it must grow, so that readers
    that hold a view of the old one are not in the way."""

    def __init__(self, store: MemoryStore, name: str, content: _Content) -> None:
        self._store = store
        self._name = name
        self._content = content
        self._lock = threading.Lock()
        self._is_open = True

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        with self._lock:
            if not self._is_open:
                raise StorageError(
                    "the file is closed already", checkpoint=self._store.url, file=self._name
                )
            end = offset + sum(buffer.nbytes for buffer in buffers)
            data = self._content.data
            if end > len(data):
                data = bytearray(end)
                data[: len(self._content.data)] = self._content.data
            for buffer in buffers:
                data[offset : offset + buffer.nbytes] = buffer
                offset += buffer.nbytes
            self._content.data = data
            self._content.changed = time.monotonic()
            self._content.tag = uuid.uuid4().hex

    def sync(self) -> None:
        return None

    def close(self) -> None:
        with self._lock:
            self._is_open = False

    def abort(self) -> None:
        self.close()
        self._store.delete([self._name])


class MemoryBackend(ShardedBackend):
    """``memory://<name>``: every instance keeps its own stores, by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[str, MemoryStore] = {}

    def __reduce__(self) -> Any:
        raise StorageError(
            "a memory: store is seen by one process only, and cannot go to another",
            kind="unsupported_storage",
            hint="save by a thread, or to a storage that processes share",
        )

    def open_store(self, url: str | os.PathLike[str], **options: Any) -> ByteStore:
        """The store of that name, made on first use. Takes no options."""
        if options:
            raise TypeError(f"memory: takes no options, got {sorted(options)}")
        name = os.fspath(url)
        with self._lock:
            return self._stores.setdefault(name, MemoryStore(name))
