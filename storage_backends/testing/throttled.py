"""``ThrottledByteStore``: a store as slow as an object store, on any machine.

Belongs here: latency and bandwidth of a medium, and how many streams were in use. Does not belong
here: single calls that are slow or hang (``faulty``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

from dcp_engine.storage import Buffer, ByteStore, ByteStoreFile, ReadRange
from storage_backends.testing.wrapping import WrappingByteStore

__all__ = ["ThrottledByteStore"]

T = TypeVar("T")


class ThrottledByteStore(WrappingByteStore):
    """Wraps any store. Every request waits, then its bytes come at a stream's pace.

    A request is a call (``get`` too), but ``read`` makes one for each stretch of ranges that follow
    each other, one after the other, as a client of an object store without concurrency of its own
    would; and a call of ``delete`` is one. Each call is a stream of its own.

    Args:
        inner: the store.
        latency: seconds from a request to its first byte.
        bandwidth: bytes a second of one stream; None: any.
        streams: how many requests the medium serves at once; the others wait. None: any number.
        preferred_read: bytes that a reader should ask for at once; by default as many as make
            ``latency`` a twentieth of the time.
        clock, sleep: for tests.
    """

    def __init__(
        self,
        inner: ByteStore,
        *,
        latency: float = 0.0,
        bandwidth: float | None = None,
        streams: int | None = None,
        preferred_read: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._latency = latency
        self._bandwidth = bandwidth
        self._limit = nullcontext() if streams is None else threading.BoundedSemaphore(streams)
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._active = 0
        if preferred_read is None and bandwidth is not None:
            preferred_read = int(19 * latency * bandwidth)
        self.preferred_read = max(inner.preferred_read, preferred_read or 0)
        self.requests = 0
        """How many requests were made."""
        self.peak_streams = 0
        """The most that were under way at once."""

    def _request(self, call: Callable[[], T], nbytes: Callable[[T], int] = lambda _: 0) -> T:
        with self._limit:
            begin = self._clock()
            with self._lock:
                self.requests += 1
                self._active += 1
                self.peak_streams = max(self.peak_streams, self._active)
            try:
                # Nothing comes before the latency is over, then the medium below has its time.
                self._wait_until(begin + self._latency)
                result = call()
                pace = nbytes(result) / self._bandwidth if self._bandwidth else 0.0
                self._wait_until(begin + self._latency + pace)
                return result
            finally:
                with self._lock:
                    self._active -= 1

    def _wait_until(self, moment: float) -> None:
        rest = moment - self._clock()
        if rest > 0:
            self._sleep(rest)

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        return self._request(call)

    def local_path(self, name: str) -> str | None:
        return None  # or bytes would come by another way

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self._request(lambda: self.inner.put(name, data, if_absent=if_absent), _always(len(data)))

    def put_over(self, name: str, data: bytes, tag: str) -> None:
        self._request(lambda: self.inner.put_over(name, data, tag), _always(len(data)))

    def get(self, name: str, *, limit: int | None = None) -> bytes:
        return self._request(lambda: self.inner.get(name, limit=limit), len)

    def delete(self, names: Iterable[str]) -> None:
        self._request(lambda: self.inner.delete(names))

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        for part in _adjacent(ranges):
            nbytes = sum(item.buffer.nbytes for item in part)
            self._request(partial(self.inner.read, name, part), _always(nbytes))

    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        nbytes = sum(buffer.nbytes for buffer in buffers)
        self._request(lambda: file.write(buffers, offset), _always(nbytes))


def _always(nbytes: int) -> Callable[[object], int]:
    return lambda _: nbytes


def _adjacent(ranges: Sequence[ReadRange]) -> list[list[ReadRange]]:
    """Runs of ranges each of which begins where the one before ends."""
    runs: list[list[ReadRange]] = []
    end = -1
    for item in ranges:
        if item.offset != end:
            runs.append([])
        runs[-1].append(item)
        end = item.offset + item.buffer.nbytes
    return runs
