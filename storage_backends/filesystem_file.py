"""A file of the local (or mounted) file system while it is written.

Belongs here: writing, write-back and durability of one open file. Does not belong here: paths and
directories (``filesystem_store``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress

from dcp_engine.errors import StorageError
from dcp_engine.storage import Buffer, ByteStore, ByteStoreFile
from storage_backends.direct_io import DirectWriter
from storage_backends.os_errors import storage_errors
from storage_backends.vectored_io import WRITE_BACK_BYTES, pwrite_all, start_write_back

__all__ = ["FileSystemFile"]

_DIRECT_BYTES = 1 << 20
"""Smaller files are not worth direct I/O."""


class FileSystemFile(ByteStoreFile):
    """A file being written under its final name (which no reader knows before the commit).

    Args:
        descriptor: of the file, open for writing; closed by ``close`` or ``abort``.
        size: bytes that it will have, if that is known.
    """

    def __init__(self, store: ByteStore, name: str, descriptor: int, size: int | None) -> None:
        self._store = store
        self._name = name
        self._size = size
        self._descriptor: int | None = descriptor
        self._lock = threading.Lock()
        # One write at a time: the kernel's own lock of a file lets no more in, and threads that
        # wait for it burn processor time that digests need.
        self._writing = threading.Lock()
        self._direct: DirectWriter | None = None

    def bypass_cache(self) -> None:
        """See ``ByteStoreFile``. Only where ``sync`` waits for the disk anyway, and while the
        file is written from begin to end."""
        if not self._store.durable_sync or (self._size or 0) < _DIRECT_BYTES:
            return
        with storage_errors("write the file", checkpoint=self._store.url, file=self._name):
            self._direct = DirectWriter.begin(self._open_descriptor())

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise StorageError(
                "the file is closed already", checkpoint=self._store.url, file=self._name
            )
        return self._descriptor

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        with storage_errors("write the file", checkpoint=self._store.url, file=self._name):
            descriptor = self._open_descriptor()
            nbytes = sum(buffer.nbytes for buffer in buffers)
            with self._writing:
                if self._writes_directly(buffers, offset, nbytes):
                    return
                pwrite_all(descriptor, buffers, offset)
            # A small file's bytes too, when they are all there: it may be synced after others.
            at_once = nbytes >= WRITE_BACK_BYTES or offset + nbytes == self._size
            if self._store.durable_sync and at_once:
                start_write_back(descriptor, offset, nbytes)

    def _writes_directly(self, buffers: Sequence[Buffer], offset: int, nbytes: int) -> bool:
        if self._direct is None:
            return False
        in_order = offset == self._direct.end
        if in_order:
            self._direct.write(buffers)
        if not in_order or offset + nbytes == self._size:
            self._end_direct()
        return in_order

    def _end_direct(self) -> None:
        """All that comes later goes through the page cache."""
        direct, self._direct = self._direct, None
        if direct is not None:
            direct.finish()

    def sync(self) -> None:
        if not self._store.durable_sync:
            return
        with storage_errors("make the file durable", checkpoint=self._store.url, file=self._name):
            descriptor = self._open_descriptor()
            with self._writing:
                self._end_direct()
            os.fsync(descriptor)

    def _take(self) -> int | None:
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
        return descriptor

    def close(self) -> None:
        with storage_errors("close the file", checkpoint=self._store.url, file=self._name):
            with self._writing:
                self._end_direct()
            descriptor = self._take()
            if descriptor is not None:
                # NFS reports at close that a write before failed.
                os.close(descriptor)

    def abort(self) -> None:
        descriptor = self._take()
        # With what it holds back: the descriptor's number may be another file's soon.
        self._direct = None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)
        with suppress(OSError):
            self._store.delete([self._name])
