"""``pwritev`` and ``preadv`` until every byte is done.

Belongs here: loops over system calls on one descriptor. Does not belong here: paths, names,
errors other than the system's own and ``EOFError``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["pread_all", "pwrite_all"]

_IOV_MAX = max(16, os.sysconf("SC_IOV_MAX"))
"""Most buffers one call takes (1,024 on Linux)."""


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
