"""Digests of what another thread writes meanwhile.

Belongs here: the thread beside the one that writes a file, and handing work to it. Does not belong
here: writing (``write_files``), and the digest itself (``dcp_engine.format.digest``).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

import numpy as np
import numpy.typing as npt

from dcp_engine.format.digest import block_digests

__all__ = ["DigestThread", "Undigested"]

U64 = npt.NDArray[np.uint64]
Undigested = tuple[memoryview, U64]
"""Bytes, and where the digests of their blocks go."""


class DigestThread:
    """A context manager; leaving it by an error drops what was not begun yet.

    Whoever hands work over writes the same bytes right after: the thread is through with some
    megabytes in a fraction of the time that a write of them takes. It therefore reads ahead of the
    write, into a cache that both share, and waits for more when the writer comes back, which finds
    the interpreter's lock free.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._queue: queue.SimpleQueue[Sequence[Undigested] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dcp_engine-digests", daemon=True)

    def add(self, work: Sequence[Undigested]) -> None:
        """Have ``work`` done, some time before ``finish`` returns."""
        self._queue.put(work)

    def finish(self) -> None:
        """Return when all digests are where they belong. The caller takes a share in what the
        thread has not begun, so that it does not wait for a thread that gets no processor."""
        with suppress(queue.Empty):
            while True:
                work = self._queue.get_nowait()
                if work is not None:
                    self._digest(work)
        self._end()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> DigestThread:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._end()

    def _end(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (work := self._queue.get()) is not None:
                self._digest(work)
        except BaseException as error:
            self._error = error

    def _digest(self, work: Sequence[Undigested]) -> None:
        for view, out in work:
            out[:] = block_digests(view, self._block_size)
