"""A byte store that passes every call on: the base of the kit's doubles.

Belongs here: plain delegation. Subclasses override ``around`` and the methods whose data they
change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from dcp_engine.storage import Buffer, ByteStore, ByteStoreFile, ReadRange, StoredFile

__all__ = ["WrappingByteStore", "WrappingFile"]

T = TypeVar("T")


class WrappingByteStore(ByteStore):
    """Delegates to ``inner``; every call goes through ``around(operation, name, call)``."""

    def __init__(self, inner: ByteStore) -> None:
        self.inner = inner
        self.random_write = inner.random_write
        self.concurrent_writes = inner.concurrent_writes
        self.atomic_replace = inner.atomic_replace
        self.create_if_absent = inner.create_if_absent
        self.replace_if_same = inner.replace_if_same
        self.durable_sync = inner.durable_sync
        self.shared_between_processes = inner.shared_between_processes
        self.preferred_read = inner.preferred_read

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        """Called for each operation, also those of files; override to watch or to fail."""
        return call()

    @property
    def url(self) -> str:
        return self.inner.url

    def local_path(self, name: str) -> str | None:
        return self.inner.local_path(name)

    def make_directory(self, name: str) -> None:
        self.around("make_directory", name, lambda: self.inner.make_directory(name))

    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        file = self.around("create", name, lambda: self.inner.create(name, size))
        return WrappingFile(self, name, file)

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self.around("put", name, lambda: self.inner.put(name, data, if_absent=if_absent))

    def tag(self, name: str) -> str:
        return self.around("tag", name, lambda: self.inner.tag(name))

    def put_over(self, name: str, data: bytes, tag: str) -> None:
        self.around("put_over", name, lambda: self.inner.put_over(name, data, tag))

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        self.around("read", name, lambda: self.inner.read(name, ranges))

    def size(self, name: str) -> int:
        return self.around("size", name, lambda: self.inner.size(name))

    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        return self.around("list", prefix, lambda: self.inner.list(prefix))

    def replace(self, source: str, target: str) -> None:
        self.around("replace", target, lambda: self.inner.replace(source, target))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._delete_one(name)

    def _delete_one(self, name: str) -> None:
        self.around("delete", name, lambda: self.inner.delete([name]))

    def sync_directory(self, name: str) -> None:
        self.around("sync_directory", name, lambda: self.inner.sync_directory(name))

    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        """One ``write`` of a file of this store."""
        self.around("write", name, lambda: file.write(buffers, offset))

    def close(self) -> None:
        self.inner.close()


class WrappingFile(ByteStoreFile):
    """A file of a ``WrappingByteStore``."""

    def __init__(self, store: WrappingByteStore, name: str, inner: ByteStoreFile) -> None:
        self._store = store
        self._name = name
        self._inner = inner

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        self._store.write_to(self._inner, self._name, buffers, offset)

    def bypass_cache(self) -> None:
        self._inner.bypass_cache()

    def sync(self) -> None:
        self._store.around("sync", self._name, self._inner.sync)

    def close(self) -> None:
        self._store.around("close", self._name, self._inner.close)

    def abort(self) -> None:
        self._store.around("abort", self._name, self._inner.abort)
