"""``pwritev`` and ``preadv`` until every byte is done.

Belongs here: loops over system calls on one descriptor. Does not belong here: paths, names,
errors other than the system's own and ``EOFError``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence

from dcp_engine.storage import ReadRange

__all__ = ["adjacent", "pread_all", "pwrite_all", "start_write_back"]

_IOV_MAX = max(16, os.sysconf("SC_IOV_MAX"))
"""Most buffers one call takes (1,024 on Linux)."""


WRITE_BACK_BYTES = 1 << 20
"""From so many bytes on, a write is worth to be started early."""
_SYNC_FILE_RANGE_WRITE = 2


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's own; not in Python's ``os``."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function


_sync_file_range = _find_sync_file_range()


def start_write_back(descriptor: int, offset: int, nbytes: int) -> None:
    """Have the disk begin with these bytes now, instead of all at once in ``fsync``: 1.4 to 1.6
    times faster on a local disk. Promises nothing; what goes wrong is told by ``fsync``."""
    if _sync_file_range is not None and nbytes >= WRITE_BACK_BYTES:
        _sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def _advance(buffers: list[memoryview], begin: int, done: int) -> int:
    """Skip ``done`` bytes from ``buffers[begin:]``; a buffer half done is cut in place."""
    while done:
        length = buffers[begin].nbytes
        if done < length:
            buffers[begin] = buffers[begin][done:]
            return begin
        done -= length
        begin += 1
    return begin


def pwrite_all(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write ``buffers`` one behind the other from ``offset``. EINTR is Python's business."""
    pending = [buffer for buffer in buffers if buffer.nbytes]
    begin = 0
    while begin < len(pending):
        done = os.pwritev(descriptor, pending[begin : begin + _IOV_MAX], offset)
        if done <= 0:
            raise OSError("the system wrote nothing and gave no reason")
        offset += done
        begin = _advance(pending, begin, done)


def pread_all(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Fill ``buffers`` one behind the other from ``offset``; ``EOFError`` if the file ends."""
    pending = [buffer for buffer in buffers if buffer.nbytes]
    begin = 0
    while begin < len(pending):
        done = os.preadv(descriptor, pending[begin : begin + _IOV_MAX], offset)
        if done == 0:
            raise EOFError(f"the file ends before byte {offset + 1}")
        offset += done
        begin = _advance(pending, begin, done)


def adjacent(ranges: Sequence[ReadRange]) -> Iterator[tuple[int, list[memoryview]]]:
    """Ranges that follow each other in the file, as one offset and many buffers."""
    begin = end = 0
    buffers: list[memoryview] = []
    for item in ranges:
        if buffers and item.offset != end:
            yield begin, buffers
            buffers = []
        if not buffers:
            begin = end = item.offset
        buffers.append(item.buffer)
        end += item.buffer.nbytes
    if buffers:
        yield begin, buffers
