"""Ranges of one file, read together, checked against their digests, and put where they belong.

Belongs here: scratch memory, and what is read with one request. Does not belong here: which
transfers there are, and on which thread (``read_files``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from dcp_engine.format.digest import block_count, block_digests, digest_value
from dcp_engine.geometry.runs import Runs
from dcp_engine.storage import Check, ReadRange
from storage_backends.block_digester import BlockDigester
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.large_blocks import BlockPart
from storage_backends.tensor_bytes import box_of, copy_box, memory_of

__all__ = ["READ_RANGES", "Batch", "Scratch", "Transfer", "Wanted"]

U64 = npt.NDArray[np.uint64]

READ_RANGES = 1024
"""Ranges per read: what ``preadv`` takes."""


class Wanted(NamedTuple):
    """A box of a stored chunk, and the tensor that takes it."""

    name: str
    file: int
    """Row of the manifest's data files."""
    start: int
    """Where the chunk begins, behind the begin of the file's data section."""
    nbytes: int
    """Size of the chunk."""
    sizes: tuple[int, ...]
    """Shape of the chunk."""
    within: tuple[int, ...]
    lengths: tuple[int, ...]
    tensor: torch.Tensor
    """Of shape ``lengths``; any strides, any device."""
    digests: U64 | None
    """Of the chunk's blocks; None: do not check."""
    run: int
    """Where the box begins in the chunk, in bytes, if it is one run of them; else -1."""


class Transfer(NamedTuple):
    """Bytes ``begin`` to ``end`` of a chunk, from one run or from several."""

    wanted: Wanted
    begin: int
    end: int
    direct: memoryview | None
    """Where the bytes belong; None: through scratch memory into ``box``."""
    box: torch.Tensor


class Scratch:
    """Memory that a thread uses again and again.

    Args:
        size: bytes, unless a single piece needs more.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor | None:
        """``nbytes`` that nobody else has, or None if the rest is too little."""
        if self._used + nbytes > self._memory.numel():
            if self._used:
                return None
            # The largest part, with a block to either side.
            self._memory = torch.empty(max(nbytes, self._size), dtype=torch.uint8)
        begin = self._used
        # Elements of every size stay aligned.
        self._used += -(-nbytes // 64) * 64
        return self._memory[begin : begin + nbytes]

    def release(self) -> None:
        """All of it is free again."""
        self._used = 0


class Batch:
    """Collects ranges of one file, reads them at one go, checks them, copies what has to be. A
    context: the file stays open in it, from the first read on."""

    def __init__(
        self,
        files: CheckpointFiles,
        file: int,
        check: Check,
        read_bytes: int,
        scratch: Scratch,
        requests: AbstractContextManager[object],
    ) -> None:
        self._files = files
        self._file = files.manifest.data_files[file]
        self._path = files.path(self._file.name)
        self._block_size = files.manifest.block_size
        self._check = check
        self._read_bytes = read_bytes
        self._scratch = scratch
        self._requests = requests
        self._open = ExitStack()
        self._read_file: Callable[[Sequence[ReadRange]], None] | None = None
        self._ranges: list[ReadRange] = []
        self._held = 0
        self._checks: list[tuple[Wanted, int, Sequence[memoryview]]] = []
        self._copies: list[Callable[[], None]] = []
        self._names: list[str] = []
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()

    def add(self, transfer: Transfer) -> None:
        """Read ``transfer`` with this batch or the next one."""
        wanted, begin, end, view, box = transfer
        low, high = begin, end
        if wanted.digests is not None:
            size = self._block_size
            low = begin - begin % size
            high = min(-(-end // size) * size, wanted.nbytes)
        if view is None:
            self._add_strided(wanted, begin, low, high, box)
        elif low == begin and high == end:
            self._read(wanted, low, view)
            self._checks.append((wanted, low, [view]))
        else:
            self._add_widened(wanted, begin, end, low, high, view)
        if self._held >= self._read_bytes or len(self._ranges) >= READ_RANGES:
            self.flush()

    def add_runs(self, wanted: Wanted, runs: Runs) -> None:
        """Read each run of a box into its place in contiguous memory, unchecked."""
        base, length = self._file.data_start + wanted.start, runs.length
        view = memory_of(wanted.tensor)
        for first in range(0, runs.count, READ_RANGES):
            begins = (base + runs.starts(first, first + READ_RANGES)).tolist()
            places = range(first * length, (first + len(begins)) * length, length)
            parts = [view[place : place + length] for place in places]
            self._ranges += map(ReadRange, begins, parts)
            self._names.append(wanted.name)
            self._held += len(begins) * length
            if self._held >= self._read_bytes or len(self._ranges) >= READ_RANGES:
                self.flush()

    def add_block(self, wanted: Wanted, parts: Sequence[BlockPart]) -> None:
        """Read one block of a chunk part by part, into place and into the digest; the block is
        checked when its bytes are where they belong."""
        self.flush()
        if wanted.digests is None:
            raise ValueError("a chunk that is not checked has no blocks")
        digest = xxhash.xxh3_64()
        base = self._file.data_start + wanted.start
        for begin, end, view, boxes in parts:
            scratch = None if view is not None else self._take(end - begin)
            if scratch is not None:
                view = memory_of(scratch)
            if view is not None:
                self._request([ReadRange(base + begin, view)], wanted.name)
                digest.update(view)
                self.bytes_read += view.nbytes
            if scratch is not None:
                for offsets, lengths, first in boxes:
                    box = box_of(wanted.tensor, offsets, lengths)
                    copy_box(scratch, first, _strides(wanted.sizes), box)
                self._scratch.release()
        block = parts[0].begin // self._block_size
        if digest.intdigest() != int(wanted.digests[block]):
            self._refuse(wanted, block)

    def _add_strided(
        self, wanted: Wanted, begin: int, low: int, high: int, box: torch.Tensor
    ) -> None:
        scratch = self._take(high - low)
        view = memory_of(scratch)
        self._read(wanted, low, view)
        self._checks.append((wanted, low, [view]))
        strides = _strides(wanted.sizes)
        self._copies.append(lambda: copy_box(scratch, begin - low, strides, box))

    def _add_widened(
        self, wanted: Wanted, begin: int, end: int, low: int, high: int, view: memoryview
    ) -> None:
        """A run that ends inside blocks: its edges go through scratch memory beside it."""
        head = self._take(begin - low + high - end)
        edges = memory_of(head)
        before, behind = edges[: begin - low], edges[begin - low :]
        parts = [part for part in (before, view, behind) if part.nbytes]
        at = low
        for part in parts:
            self._read(wanted, at, part)
            at += part.nbytes
        self._checks.append((wanted, low, parts))

    def _take(self, nbytes: int) -> torch.Tensor:
        scratch = self._scratch.take(nbytes)
        if scratch is None:
            self.flush()
            scratch = self._scratch.take(nbytes)
        if scratch is None:
            raise MemoryError(f"no scratch memory of {nbytes} bytes")
        return scratch

    def _read(self, wanted: Wanted, begin: int, view: memoryview) -> None:
        offset = self._file.data_start + wanted.start + begin
        self._ranges.append(ReadRange(offset, view))
        self._names.append(wanted.name)
        self._held += view.nbytes

    def flush(self) -> None:
        """Read, check and copy what was collected."""
        if not self._ranges:
            return
        # The tensor, if this batch is about one only.
        tensor = self._names[0] if self._names.count(self._names[0]) == len(self._names) else None
        self._request(self._ranges, tensor)
        self.bytes_read += self._held
        for wanted, begin, parts in self._checks:
            if wanted.digests is not None:
                self._compare(wanted, begin, parts)
        for copy in self._copies:
            copy()
        self._ranges, self._held = [], 0
        self._checks, self._copies, self._names = [], [], []
        self._scratch.release()

    def _request(self, ranges: Sequence[ReadRange], tensor: str | None) -> None:
        with self._requests, self._files.reading(self._file.name, tensor=tensor):
            self._check()
            if self._read_file is None:
                self._read_file = self._open.enter_context(self._files.store.opened(self._path))
            self._read_file(ranges)

    def _compare(self, wanted: Wanted, begin: int, parts: Sequence[memoryview]) -> None:
        """Check consecutive ``parts`` from byte ``begin``, a block border, of the chunk."""
        if wanted.digests is None:
            return
        first = begin // self._block_size
        if len(parts) == 1 and parts[0].nbytes <= self._block_size:
            if digest_value(parts[0]) != int(wanted.digests[first]):
                self._refuse(wanted, first)
            return
        made = _digests_over(parts, self._block_size)
        expected = wanted.digests[first : first + len(made)]
        if len(made) != len(expected) or not (made == expected).all():
            self._refuse(wanted, first + int(np.flatnonzero(made != expected)[0]))

    def _refuse(self, wanted: Wanted, block: int) -> None:
        begin = block * self._block_size
        end = min(begin + self._block_size, wanted.nbytes)
        base = self._file.data_start + wanted.start
        raise self._files.damaged(self._file, base + begin, base + end, wanted.name)


def _strides(sizes: Sequence[int]) -> list[int]:
    """Of a contiguous array, in elements."""
    strides = [1] * len(sizes)
    for d in range(len(sizes) - 2, -1, -1):
        strides[d] = strides[d + 1] * sizes[d + 1]
    return strides


def _digests_over(parts: Sequence[memoryview], block_size: int) -> U64:
    """``block_digests`` of ``parts`` as if they were joined."""
    if len(parts) == 1:
        return block_digests(parts[0], block_size)
    made = np.empty(block_count(sum(part.nbytes for part in parts), block_size), np.uint64)
    digester = BlockDigester(made, block_size)
    for part in parts:
        digester.update(part)
    digester.finish()
    return made
