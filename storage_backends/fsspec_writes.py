"""Files being written through fsspec, in bounded memory.

Belongs here: ``PartsFile``, which sends parts of a file at once, and ``StreamFile``, for file
systems that take one byte after the other. Does not belong here: how a part reaches its medium
(``fsspec_parts``).
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from dcp_engine.errors import StorageError
from dcp_engine.storage import Buffer, ByteStoreFile

__all__ = ["PartSink", "PartsFile", "StreamFile"]

Guard = Callable[[str, Callable[[], Any]], Any]
"""``guard(action, call)`` does ``call``, again if need be, and raises a byte store's errors."""


class PartSink(Protocol):
    """Where the parts of one file go. ``send`` is called from several threads."""

    def put_whole(self, data: bytes) -> None:
        """Store a file that is one part."""

    def begin(self) -> None:
        """More than one part is going to come."""

    def send(self, number: int, offset: int, data: bytes) -> None:
        """Send part ``number``, counted from 0."""

    def finish(self, size: int) -> None:
        """All parts were sent."""

    def discard(self) -> None:
        """The file is given up: remove what was sent."""


class _OpenFile(ByteStoreFile):
    """What both kinds share: the order of writes, and a single end."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        self._lock = threading.Lock()
        self._offset = 0
        self._ended = False

    def _refuse(self, message: str) -> StorageError:
        return StorageError(message, checkpoint=self._url, file=self._name)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        with self._lock:
            if self._ended:
                raise self._refuse("the file is closed already")
            if offset != self._offset:
                raise self._refuse(
                    f"a write at byte {offset}, where the last one ended at {self._offset}: this "
                    "storage takes files in order only"
                )
            for buffer in buffers:
                self._append(buffer if buffer.c_contiguous else memoryview(bytes(buffer)))
                self._offset += buffer.nbytes

    @abc.abstractmethod
    def _append(self, view: memoryview) -> None:
        """Take the next bytes of the file."""

    def _end(self) -> bool:
        """Whether the file was open until now."""
        with self._lock:
            was_open, self._ended = not self._ended, True
        return was_open

    def sync(self) -> None:
        return None


class PartsFile(_OpenFile):
    """Collects parts, and sends several at a time.

    Holds at most ``slots + 1`` parts: one that fills, the others on their way.

    Args:
        sink: where the parts go.
        part_bytes: size of a part; the last one is shorter.
        slots: parts on their way at a time.
        pool: sends them.
        guard: around each call of ``sink``.
    """

    def __init__(
        self,
        url: str,
        name: str,
        sink: PartSink,
        *,
        part_bytes: int,
        slots: int,
        pool: ThreadPoolExecutor,
        guard: Guard,
    ) -> None:
        super().__init__(url, name)
        self._sink = sink
        self._part_bytes = part_bytes
        self._pool = pool
        self._guard = guard
        self._free = threading.Semaphore(slots)
        self._part = bytearray()
        self._sent: list[Future[None]] = []
        self._begun = False

    def _append(self, view: memoryview) -> None:
        at = 0
        while at < view.nbytes:
            if len(self._part) == self._part_bytes:
                self._send()
            room = self._part_bytes - len(self._part)
            self._part += view[at : at + room]
            at += room

    def _send(self) -> None:
        if not self._begun:
            self._guard("begin the file", self._sink.begin)
            self._begun = True
        self._free.acquire()
        try:
            self._raise_first_failure()
            number, data = len(self._sent), bytes(self._part)
            self._part = bytearray()
            self._sent.append(self._pool.submit(self._send_one, number, data))
        except BaseException:
            self._free.release()
            raise

    def _send_one(self, number: int, data: bytes) -> None:
        try:
            offset = number * self._part_bytes
            self._guard("write the file", lambda: self._sink.send(number, offset, data))
        finally:
            self._free.release()

    def _raise_first_failure(self) -> None:
        for future in self._sent:
            if future.done():
                future.result()

    def close(self) -> None:
        if not self._end():
            return
        if not self._begun:
            data = bytes(self._part)
            self._guard("write the file", lambda: self._sink.put_whole(data))
        else:
            if self._part:
                self._send()
            for future in self._sent:
                future.result()
            self._guard("finish the file", lambda: self._sink.finish(self._offset))
        self._part = bytearray()

    def abort(self) -> None:
        self._end()
        for future in self._sent:
            future.cancel()
        for future in self._sent:
            with suppress(BaseException):
                future.result()
        self._part = bytearray()
        # Whoever gives a file up has an error of its own to tell.
        with suppress(Exception):
            self._guard("give the file up", self._sink.discard)


class StreamFile(_OpenFile):
    """Writes through fsspec's own file object, which sends parts as it sees fit.

    Args:
        file: opened for writing.
        remove: removes what may have arrived.
        guard: around each call; not repeated, since nobody knows how far a call came.
        release: called once, when ``file`` is no longer used.
    """

    def __init__(
        self,
        url: str,
        name: str,
        file: Any,
        *,
        remove: Callable[[], None],
        guard: Guard,
        release: Callable[[], None],
    ) -> None:
        super().__init__(url, name)
        self._file = file
        self._remove = remove
        self._guard = guard
        self._release = release

    def _append(self, view: memoryview) -> None:
        def write() -> None:
            # Some keep what they are given until it is sent, and the memory is the caller's.
            data = bytes(view)
            done = 0
            while done < len(data):
                count = self._file.write(data[done:] if done else data)
                # Some say nothing, and have taken all.
                done += len(data) if count is None else count

        if view.nbytes:
            self._guard("write the file", write)

    def close(self) -> None:
        if self._end():
            try:
                self._guard("finish the file", self._file.close)
            finally:
                self._release()

    def abort(self) -> None:
        if self._end():
            # Closing would finish the file, and so would the garbage collector.
            with suppress(Exception):
                self._file.discard()
            with suppress(Exception):
                self._file.closed = True
            self._release()
        with suppress(Exception):
            self._guard("give the file up", self._remove)
