"""Writing past the page cache: what the system asks of it, and a file that is written so.

Belongs here: alignment, and a sequence of buffers written by direct I/O. Does not belong here: when
a file is written so, and its end (``filesystem_file``).

A write through the page cache costs a copy into fresh pages and their way to the disk, all of it
processor time and memory bandwidth that training beside it wants, and throws out of the cache what
training reads from there. A direct write has the disk take the bytes from where they are.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage_backends.vectored_io import pwrite_all

__all__ = ["DirectAlignment", "DirectWriter", "direct_alignment"]

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""0 where the system has none."""
PAGE = 4096
"""Positions in a file are multiples of this, whatever less a disk would take: file systems
allocate blocks of it, and have to clear the rest of one that is begun."""
BOUNCE_BYTES = 4 << 20
"""Bytes that are collected before they are written, of what does not lie as the disk wants it."""
ZERO_COPY_BYTES = 256 << 10
"""From so many on, bytes that lie as the disk wants them are written from where they are."""
_MOST_OFFSET = 64 << 10
"""Largest blocks of a file system."""
_NUMPY_BYTES = 64 << 10
"""From so many on, numpy copies, which lets other threads run meanwhile."""
_REFUSALS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_STX_DIO_AT = 0x98
"""Of ``stx_dio_mem_align`` and ``stx_dio_offset_align`` in ``struct statx`` (linux/stat.h)."""


@dataclass(frozen=True, slots=True)
class DirectAlignment:
    """What direct I/O on a file asks for, in bytes; powers of two."""

    memory: int
    """Addresses are multiples of this."""
    offset: int
    """Positions in the file, and lengths, are multiples of this."""


def direct_alignment(descriptor: int) -> DirectAlignment | None:
    """What a direct write to the open file asks for; None where there should be none.

    None where the system or the file system says so (``statx``, Linux 6.1), and where the file
    system does not lie on one block device: a network file system hides its delays by the page
    cache, and one in memory is that cache.
    """
    if not O_DIRECT or not os.major(os.fstat(descriptor).st_dev):
        return None
    told = _told(descriptor)
    if told is None:  # an older system does not tell, and takes pages
        return DirectAlignment(PAGE, PAGE)
    memory, offset = told
    if not memory or not offset or memory > PAGE or offset > _MOST_OFFSET:
        return None
    return DirectAlignment(memory, max(offset, PAGE))


def _told(descriptor: int) -> tuple[int, int] | None:
    """``stx_dio_mem_align`` and ``stx_dio_offset_align``; not in Python's ``os`` before 3.15."""
    try:
        statx = ctypes.CDLL(None).statx
    except (AttributeError, OSError):
        return None
    found = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found) != 0:
        return None
    (mask,) = struct.unpack_from("=I", found, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("=II", found, _STX_DIO_AT)
    return memory, offset


class DirectWriter:
    """Writes a file from its begin on, in order, past the page cache. Not for several threads.

    What does not lie as the disk wants it goes through memory that does, so that every byte may
    come from anywhere; the rest of less than a page is held back until ``finish``. Where the file
    system refuses in spite of what it told, all goes through the page cache.
    """

    def __init__(self, descriptor: int, alignment: DirectAlignment) -> None:
        self._descriptor = descriptor
        self._alignment = alignment
        self._at = 0
        """Bytes of the file that are written; a multiple of the alignment."""
        memory = mmap.mmap(-1, BOUNCE_BYTES)  # begins on a page
        self._collected = memoryview(memory)
        self._array = np.frombuffer(memory, np.uint8)
        self._held = 0
        """Bytes behind them that are collected."""
        self._set_direct(True)

    @classmethod
    def begin(cls, descriptor: int) -> DirectWriter | None:
        """For the open file, which is empty; None where there should be no direct I/O."""
        alignment = direct_alignment(descriptor)
        if alignment is None:
            return None
        try:
            return cls(descriptor, alignment)
        except OSError as error:
            if error.errno in _REFUSALS:
                return None
            raise

    @property
    def end(self) -> int:
        """Where the next bytes belong."""
        return self._at + self._held

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Take what follows; the memory is the caller's again."""
        for buffer in buffers:
            if buffer.nbytes < ZERO_COPY_BYTES:
                self._collect(buffer)
            else:
                self._write_large(buffer)

    def finish(self) -> None:
        """Write what is held; what is written later goes through the page cache."""
        whole = self._held - self._held % self._alignment.offset
        rest = self._collected[whole : self._held]
        if whole:
            self._write_out([self._collected[:whole]])
        self._set_direct(False)
        if rest.nbytes:
            pwrite_all(self._descriptor, [rest], self._at)

    def _write_large(self, buffer: memoryview) -> None:
        address = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
        gap = -self._held % self._alignment.offset
        if (address + gap) % self._alignment.memory:
            self._collect(buffer)
            return
        self._collect(buffer[:gap])
        whole = (buffer.nbytes - gap) // self._alignment.offset * self._alignment.offset
        in_place = buffer[gap : gap + whole]
        self._write_out([self._collected[: self._held], in_place] if self._held else [in_place])
        self._collect(buffer[gap + whole :])

    def _collect(self, buffer: memoryview) -> None:
        done = 0
        while done < buffer.nbytes:
            nbytes = min(buffer.nbytes - done, BOUNCE_BYTES - self._held)
            part, into = buffer[done : done + nbytes], slice(self._held, self._held + nbytes)
            if nbytes < _NUMPY_BYTES:
                self._collected[into] = part
            else:
                np.copyto(self._array[into], np.frombuffer(part, np.uint8))
            self._held += nbytes
            done += nbytes
            if self._held == BOUNCE_BYTES:
                self._write_out([self._collected])

    def _write_out(self, buffers: list[memoryview]) -> None:
        try:
            pwrite_all(self._descriptor, buffers, self._at)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            # Also of the second part of a write that was cut short: what for, the next call says.
            self._set_direct(False)
            pwrite_all(self._descriptor, buffers, self._at)
        self._at += sum(buffer.nbytes for buffer in buffers)
        self._held = 0

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        flags = flags | O_DIRECT if direct else flags & ~O_DIRECT
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)
