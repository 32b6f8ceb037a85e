"""``RecordingByteStore``: writes down what is asked of a store, in order.

Belongs here: the log. Does not belong here: judging it (tests and the crash explorer do).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dcp_engine.storage import Buffer, ByteStore, ByteStoreFile, ReadRange
from storage_backends.testing.wrapping import WrappingByteStore

__all__ = ["RecordedCall", "RecordingByteStore"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RecordedCall:
    """One call. ``offset`` and ``nbytes`` are set for reads and writes; ``addresses`` are those of
    the buffers, so that a test can tell whether they are the caller's own memory."""

    operation: str
    name: str
    offset: int | None = None
    nbytes: int = 0
    buffers: int = 0
    addresses: tuple[int, ...] = ()
    failed: str | None = None


class RecordingByteStore(WrappingByteStore):
    """Wraps any store; ``calls`` is the log, in the order in which the calls ended."""

    def __init__(self, inner: ByteStore) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self.calls: list[RecordedCall] = []

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        return self._record(RecordedCall(operation=operation, name=name), call)

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        buffers = [item.buffer for item in ranges]
        first = ranges[0].offset if ranges else None
        entry = _transfer("read", name, first, buffers)
        self._record(entry, lambda: self.inner.read(name, ranges))

    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        entry = _transfer("write", name, offset, buffers)
        self._record(entry, lambda: file.write(buffers, offset))

    def _record(self, entry: RecordedCall, call: Callable[[], T]) -> T:
        try:
            result = call()
        except BaseException as error:
            failed = RecordedCall(**{**vars(entry), "failed": type(error).__name__})
            with self._lock:
                self.calls.append(failed)
            raise
        with self._lock:
            self.calls.append(entry)
        return result

    def count(self, operation: str) -> int:
        """How many calls of ``operation`` there were."""
        return sum(call.operation == operation for call in self.calls)

    def nbytes(self, operation: str) -> int:
        """How many bytes ``read`` or ``write`` moved."""
        return sum(call.nbytes for call in self.calls if call.operation == operation)

    def operations(self) -> list[tuple[str, str]]:
        """Operation and name of each call."""
        return [(call.operation, call.name) for call in self.calls]

    def clear(self) -> None:
        """Forget the log."""
        with self._lock:
            self.calls.clear()


def _transfer(
    operation: str, name: str, offset: int | None, buffers: Sequence[Buffer]
) -> RecordedCall:
    return RecordedCall(
        operation=operation,
        name=name,
        offset=offset,
        nbytes=sum(buffer.nbytes for buffer in buffers),
        buffers=len(buffers),
        addresses=tuple(_address(buffer) for buffer in buffers),
    )


def _address(buffer: Buffer) -> int:
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data) if buffer.nbytes else 0
