"""Tensors copied into an arena, by several threads, shared out by bytes.

Belongs here: how bytes get there fastest. Does not belong here: where they go (``layout``), and
when (``arena_stager``).

Measured for 20,000 tensors of 1 KiB (2 busy cores): ``copy_`` 3.4 us each, ``ctypes.memmove`` 2.9,
``torch._foreach_copy_`` 2.8, ``pwritev`` of 1,024 of them to the arena's descriptor 1.2. Large ones
are moved in slices by ``memmove``, which has no second layer of threads below it as ``copy_`` has;
into memory that was never touched, one thread at a time writes them to the descriptor instead
(``Arena.takes_first_writes``), since the kernel lets one in, and the others move theirs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from dcp_engine.errors import StagingError, UsageError
from dcp_engine.planning.columns import I64
from dcp_engine.staging.arena import Arena
from dcp_engine.staging.device_copy import DeviceStreams, Ready
from dcp_engine.staging.layout import SMALL, ArenaLayout
from dcp_engine.state.adapters.memory import as_integers
from dcp_engine.storage import Check

__all__ = ["Copier", "default_threads"]

_SLICE = 16 << 20
"""Bytes between two looks at ``check``, and the unit that threads share out."""
_MAX_VECTORS = 1024
"""IOV_MAX of Linux."""
_MAX_GAP = 64
_Job = Callable[[], int]
"""Copies something; returns how many bytes."""


def default_threads() -> int:
    """As many as there are cores for this process, shared with the other ranks of the host as far
    as the launcher told (``LOCAL_WORLD_SIZE``); at most 8: memory bandwidth is used up then. More
    gain nothing, and a first copy is cheapest by one (2 ranks on 2 cores: 99 ms of processor time
    instead of 131 for 256 MiB)."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = len(os.sched_getaffinity(0)) // max(1, int(ranks) if ranks.isdigit() else 1)
    return max(1, min(share, 8))


class Copier:
    """Copies into arenas; its threads are kept until ``close``.

    Args:
        threads: that copy at the same time, the calling one included.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads if threads is not None else default_threads()
        if self.threads < 1:
            raise UsageError(f"staging needs at least one thread, not {threads}")
        self.executor: ThreadPoolExecutor | None = None
        if self.threads > 1:
            self.executor = ThreadPoolExecutor(self.threads - 1, "dcp_engine-copy")
        self._streams = DeviceStreams()

    def mark(self, sources: Sequence[torch.Tensor]) -> Ready:
        """What ``copy`` needs to know of work queued on devices; see ``DeviceStreams.mark``."""
        return self._streams.mark(sources)

    def copy(
        self,
        sources: Sequence[torch.Tensor],
        layout: ArenaLayout,
        arena: Arena,
        *,
        ready: Ready,
        check: Check,
        copied: Callable[[int], None],
        first_writes: bool = False,
    ) -> None:
        """Copy row ``i`` of ``sources`` to row ``i`` of ``layout``; on return nothing is under
        way any more, after an error either.

        Args:
            first_writes: as ``arena.takes_first_writes`` says.
            check: called by the calling thread between slices; what it raises ends the copy.
            copied: is told of bytes copied, from any thread.
        """
        rows = layout.distinct.tolist()
        host: list[int] = []
        device: list[int] = []
        for row in rows:
            (host if sources[row].is_cpu else device).append(row)
        pen = threading.Lock() if first_writes else None
        self._run(deque(_host_jobs(sources, layout, arena, host, pen)), check, copied)
        if device:
            pairs = [(_target(arena, layout, row, sources[row]), sources[row]) for row in device]
            parts = [part for pair in pairs for part in _slices(*pair)]
            self._streams.copy(parts, ready, check=check, copied=copied)

    def _run(self, jobs: deque[_Job], check: Check, copied: Callable[[int], None]) -> None:
        stop = threading.Event()

        def work(look: Check) -> None:
            try:
                while not stop.is_set():
                    look()
                    try:
                        job = jobs.popleft()
                    except IndexError:
                        return
                    copied(job())
            except BaseException:
                stop.set()
                raise

        helpers = []
        if self.executor is not None:
            count = min(self.threads - 1, len(jobs) - 1)
            helpers = [self.executor.submit(work, lambda: None) for _ in range(count)]
        try:
            work(check)
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()

    def close(self) -> None:
        """End the threads."""
        if self.executor is not None:
            self.executor.shutdown()


def _host_jobs(
    sources: Sequence[torch.Tensor],
    layout: ArenaLayout,
    arena: Arena,
    rows: Sequence[int],
    pen: threading.Lock | None,
) -> Iterator[_Job]:
    """``pen``: whoever holds it writes to the descriptor; None if nobody should."""
    nbytes, offsets = layout.nbytes.tolist(), layout.offsets.tolist()
    small, large, strided = [], [], []
    for row in rows:
        if not sources[row].is_contiguous():
            strided.append(row)
        elif nbytes[row] < SMALL:
            small.append(row)
        else:
            large.append(row)
    begin = arena.view(0, layout.size).data_ptr()
    for row in large:
        source, offset, size = sources[row].data_ptr(), offsets[row], nbytes[row]
        for at in range(0, size, _SLICE):
            move = _Move(begin + offset + at, source + at, min(_SLICE, size - at))
            yield move if pen is None else _FirstMove(move, arena.fileno(), offset + at, pen)
    for row in strided:
        for to, source_part in _slices(_target(arena, layout, row, sources[row]), sources[row]):
            yield _Elements(to, source_part)
    if small:
        pointers = np.array([sources[row].data_ptr() for row in small], np.int64)
        chosen = np.array(small, np.int64)
        yield from _batches(arena, pointers, layout.offsets[chosen], layout.nbytes[chosen])


class _Move:
    def __init__(self, target: int, source: int, nbytes: int) -> None:
        self.target, self.source, self.nbytes = target, source, nbytes

    def __call__(self) -> int:
        ctypes.memmove(self.target, self.source, self.nbytes)
        return self.nbytes


class _FirstMove:
    """Into memory that was never touched."""

    def __init__(self, move: _Move, fd: int, offset: int, pen: threading.Lock) -> None:
        self._move, self._fd, self._offset, self._pen = move, fd, offset, pen

    def __call__(self) -> int:
        if not self._pen.acquire(blocking=False):
            return self._move()
        try:
            self._write()
        finally:
            self._pen.release()
        return self._move.nbytes

    def _write(self) -> None:
        done, nbytes = 0, self._move.nbytes
        while done < nbytes:  # a signal may interrupt a call
            at = self._move.source + done
            written = _pwrite(self._fd, at, nbytes - done, self._offset + done)
            if written <= 0:
                raise _not_written(written)
            done += written


class _Elements:
    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._target, self._source = target, source

    def __call__(self) -> int:
        self._target.copy_(self._source)
        return self._target.numel() * self._target.element_size()


def _target(arena: Arena, layout: ArenaLayout, row: int, source: torch.Tensor) -> torch.Tensor:
    memory = arena.view(int(layout.offsets[row]), int(layout.nbytes[row]))
    return memory.view(source.dtype).view(source.shape)


def _slices(
    target: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both cut along the first dimension that can be cut, as integers (not all dtypes have a
    copy kernel)."""
    target, source = as_integers(target), as_integers(source)
    dim = next((d for d, n in enumerate(target.shape) if n > 1), None)
    nbytes = target.numel() * target.element_size()
    if dim is None or nbytes <= _SLICE:
        yield target, source
        return
    step = max(1, target.shape[dim] * _SLICE // nbytes)
    for at in range(0, target.shape[dim], step):
        length = min(step, target.shape[dim] - at)
        yield target.narrow(dim, at, length), source.narrow(dim, at, length)


class _Batch:
    """Many small pieces of memory to one place of the arena."""

    def __init__(self, fd: int, offset: int, vectors: I64, nbytes: int) -> None:
        self._fd, self._offset, self._vectors, self._nbytes = fd, offset, vectors, nbytes

    def __call__(self) -> int:
        vectors = self._vectors
        written = _pwritev(self._fd, vectors.ctypes.data, len(vectors), self._offset)
        total = int(vectors[:, 1].sum())
        if written != total:
            raise _not_written(written)
        return self._nbytes


def _not_written(result: int) -> StagingError:
    """For what a system call has returned, on the thread that made it."""
    code = ctypes.get_errno() if result < 0 else errno.ENOMEM
    return StagingError(
        f"copying to staging memory failed: {os.strerror(code)}",
        kind="out_of_memory" if code in (errno.ENOMEM, errno.ENOSPC) else "io_error",
    )


def _batches(arena: Arena, pointers: I64, offsets: I64, nbytes: I64) -> Iterator[_Batch]:
    """Pieces that lie close together in the arena become one call; the gaps are filled."""
    gaps = np.zeros_like(nbytes)
    gaps[:-1] = offsets[1:] - (offsets + nbytes)[:-1]
    breaks = np.flatnonzero((gaps < 0) | (gaps >= _MAX_GAP)) + 1
    begins = [0, *breaks.tolist()]
    for begin, end in zip(begins, [*breaks.tolist(), len(nbytes)], strict=True):
        for at in range(begin, end, _MAX_VECTORS // 2):
            stop = min(at + _MAX_VECTORS // 2, end)
            vectors = np.empty((2 * (stop - at), 2), np.int64)
            vectors[0::2, 0] = pointers[at:stop]
            vectors[0::2, 1] = nbytes[at:stop]
            vectors[1::2, 0] = _ZEROS.ctypes.data
            vectors[1::2, 1] = gaps[at:stop]
            vectors[-1, 1] = 0  # nothing behind the last one
            vectors = np.ascontiguousarray(vectors[vectors[:, 1] > 0])
            yield _Batch(arena.fileno(), int(offsets[at]), vectors, int(nbytes[at:stop].sum()))


_ZEROS = np.zeros(_MAX_GAP, np.uint8)
_ZEROS.flags.writeable = False


def _declared(name: str, count: Any) -> Any:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, count, ctypes.c_int64)
    function.restype = ctypes.c_ssize_t
    return function


# Not those of os: they want a Python buffer object per piece. Like them, these release the GIL.
_pwrite = _declared("pwrite64", ctypes.c_size_t)
_pwritev = _declared("pwritev64", ctypes.c_int)
