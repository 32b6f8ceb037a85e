"""One piece of anonymous shared memory, kept and reused, that another process can map too.

Belongs here: the memory itself. Does not belong here: what lies where in it (``layout``), and who
may write to it when (``pool``).

It is a memfd: one descriptor, no name in any file system, gone with the last process that holds
or maps it. It only grows. A grown arena is mapped anew; views of the older mapping stay valid and
show the same bytes, so that memory is never taken away under a tensor.
"""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import Executor
from typing import cast

import torch

from dcp_engine.closing import Closing
from dcp_engine.errors import StagingError, UsageError
from dcp_engine.staging import pages
from dcp_engine.staging.memory import require_memory

__all__ = ["Arena"]

_GRAIN = 2 << 20
"""The size is a multiple of this: of a huge page, and room for small changes."""
_TOUCH_SLICE = 64 << 20
_NAME = "dcp_engine-staging"


class Arena(Closing):
    """Staging memory of one rank.

    Args:
        pin: register the memory with CUDA; without a CUDA device there is nothing to register
            with, and it stays as it is.

    Not safe to ``reserve`` or ``close`` from several threads at once; ``view`` is.
    """

    def __init__(self, *, pin: bool = False) -> None:
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # A memfd that shrinks under a mapping is SIGBUS for whoever reads there.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._pin = pin and pages.can_pin()
        self._pinned = False
        self._base = torch.empty(0, dtype=torch.uint8, device="cpu")

    @classmethod
    def attach(cls, fd: int, size: int) -> Arena:
        """Map the arena behind ``fd``, which another process sent; ``fd`` is the
        result's to close, and closed where it cannot be mapped.

        Args:
            size: bytes, as the sender's ``size``. After the sender's has grown: ``extend``.
        """
        arena = cls.__new__(cls)
        arena._fd = fd
        arena._pin = arena._pinned = False
        arena._base = torch.empty(0, dtype=torch.uint8, device="cpu")
        try:
            arena.extend(size)
        except BaseException:
            arena.close()
            raise
        return arena

    @property
    def size(self) -> int:
        """Mapped bytes."""
        return self._base.numel()

    @property
    def pinned(self) -> bool:
        """Whether CUDA copies from and to this memory directly."""
        return self._pinned

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._fd < 0

    def fileno(self) -> int:
        """The descriptor, to be sent to another process; it stays the arena's own."""
        self._check_open()
        return self._fd

    def present(self) -> int:
        """Bytes that have been touched and therefore take memory."""
        self._check_open()
        return os.fstat(self._fd).st_blocks * 512

    @property
    def takes_first_writes(self) -> bool:
        """Whether writes to ``fileno()`` are the cheapest way to the first content: nothing is
        there yet, and no huge pages, which only a mapping gets, are to be had.

        A page that is first written through a mapping costs a fault, is cleared, and then written;
        one that a system call writes is written. Processor time for 1 GiB: 0.70 s and 0.41 s, and
        0.16 s for mapping what the call has written (``pages.map_present``), at any time later.
        """
        return self.present() == 0 and not pages.has_huge_pages()

    def reserve(self, nbytes: int) -> bool:
        """Make room for ``nbytes`` in all; returns whether the arena grew (was mapped anew).

        Whether the machine has that much memory is found out first, and nothing is touched.

        Raises:
            StagingError: it has not (``kind="out_of_memory"``).
        """
        self._check_open()
        size = -(-nbytes // _GRAIN) * _GRAIN
        self._require(nbytes)
        if size <= self.size:
            return False
        if size > os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, size)
        self._map(size)
        return True

    def _require(self, nbytes: int) -> None:
        missing = nbytes - self.present()
        if missing > _GRAIN:  # less is gaps between tensors, which nobody will ever touch
            require_memory(missing)

    def extend(self, size: int) -> None:
        """Map the first ``size`` bytes of a memfd that its owner has grown."""
        self._check_open()
        there = os.fstat(self._fd).st_size
        if size > there:
            raise UsageError(
                f"the descriptor holds {there} bytes of staging memory, and {size} were announced"
            )
        if size > self.size:
            self._map(size)

    def _map(self, size: int) -> None:
        self._unpin()
        # torch's own mapping of a file: it lives as long as tensors refer to it, and keeps no
        # descriptor. The path is how a process names what its descriptors stand for.
        try:
            storage = torch.UntypedStorage.from_file(
                f"/proc/self/fd/{self._fd}", shared=True, nbytes=size
            )
        except RuntimeError as error:  # all that torch says, whatever the errno was
            raise StagingError(
                f"{size:,} bytes of staging memory cannot be mapped: {error}"
            ) from error
        self._base = torch.empty(0, dtype=torch.uint8, device="cpu").set_(
            cast(torch.UntypedStorage, storage), 0, torch.Size((size,)), torch.Size((1,))
        )
        pages.advise_huge_pages(self._base)
        if self._pin:
            self._pinned = pages.pin(self._base)

    def touch(self, nbytes: int | None = None, *, executor: Executor | None = None) -> None:
        """Have the first ``nbytes`` (default: all) in memory; what they hold stays.

        The first write to fresh shared memory costs several times that of a later one.

        Args:
            executor: whose threads share the work; without it the caller does it.
        Raises:
            StagingError: the kernel has no such memory (``kind="out_of_memory"``).
        """
        self._check_open()
        end = self.size if nbytes is None else min(nbytes, self.size)
        self._require(end)
        sizes = [min(_TOUCH_SLICE, end - at) for at in range(0, end, _TOUCH_SLICE)]
        run = map if executor is None else executor.map
        list(run(pages.populate, self._base[:end].split_with_sizes(sizes)))

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """``(nbytes,)`` uint8 at ``offset``. The tensor keeps the mapping alive by itself, after
        ``close`` too."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise UsageError(
                f"bytes {offset} to {offset + nbytes} lie outside of an arena of {self.size}"
            )
        return self._base.narrow(0, offset, nbytes)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where the first element of ``tensor`` lies in this mapping; None if it does not."""
        if self._base.numel() == 0 or tensor.device.type != "cpu":
            return None
        if tensor.untyped_storage().data_ptr() != self._base.data_ptr():
            return None
        return tensor.data_ptr() - self._base.data_ptr()

    def close(self) -> None:
        """Give the memory back, as soon as no view is left. Any number of times."""
        if self.closed:
            return
        self._unpin()
        self._base = torch.empty(0, dtype=torch.uint8, device="cpu")
        fd, self._fd = self._fd, -1
        os.close(fd)

    def _unpin(self) -> None:
        if self._pinned:
            self._pinned = False
            pages.unpin(self._base)

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError("the arena is closed")
