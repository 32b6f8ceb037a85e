"""Ranges of one file, read together, checked against their digests, and put where they belong.

Belongs here: scratch memory, and what is read with one request. Does not belong here: which
transfers there are, and on which thread (``read_files``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from dcp_engine.closing import Closing
from dcp_engine.format.digest import digest_value
from dcp_engine.geometry.row_major import strides_of
from dcp_engine.geometry.runs import Runs
from dcp_engine.storage import Check, ReadRange
from storage_backends.block_digester import digests_around
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.large_blocks import BlockPart
from storage_backends.tensor_bytes import box_of, copy_box, memory_of

__all__ = ["READ_RANGES", "Batch", "Scratch", "Wanted"]

U64 = npt.NDArray[np.uint64]

READ_RANGES = 1024
"""Ranges per read: what ``preadv`` takes."""
_NOTHING = memoryview(b"")


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


class Scratch:
    """Memory that a thread uses again and again.

    Args:
        size: bytes, unless a single piece needs more.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._view = memory_of(self._memory)
        self._used = 0

    def take(self, nbytes: int) -> int | None:
        """The begin of ``nbytes`` that nobody else has, or None if the rest is too little."""
        begin = self._used
        if begin + nbytes > self._view.nbytes:
            if begin:
                return None
            # The largest part, with a block to either side.
            size = max(nbytes, self._size)
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            self._view = memory_of(self._memory)
        # Elements of every size stay aligned.
        self._used += -(-nbytes // 64) * 64
        return begin

    def tensor(self, begin: int, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8"""
        return self._memory[begin : begin + nbytes]

    def view(self, begin: int, nbytes: int) -> memoryview:
        return self._view[begin : begin + nbytes]

    def release(self) -> None:
        """All of it is free again."""
        self._used = 0


class Batch(Closing):
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
        self.block_size = files.manifest.block_size
        self._check = check
        self._read_bytes = read_bytes
        self._scratch = scratch
        self._requests = requests
        self._open = ExitStack()
        self._read_file: Callable[[Sequence[ReadRange]], None] | None = None
        self._ranges: list[ReadRange] = []
        self._held = 0
        self._checks: list[tuple[Wanted, int, memoryview, memoryview, memoryview]] = []
        self._copies: list[Callable[[], None]] = []
        self._names: list[str] = []
        self.bytes_read = 0

    def close(self) -> None:
        """Close the file; what was collected since the last ``flush`` is not read."""
        self._open.close()

    def add_run(self, wanted: Wanted, begin: int, end: int, view: memoryview) -> None:
        """Read bytes ``begin`` to ``end`` of the chunk into ``view``."""
        if wanted.digests is None:
            self._ranges.append(ReadRange(self._file.data_start + wanted.start + begin, view))
            self._end(wanted.name, end - begin)
            return
        low, high = self._widened(wanted, begin, end)
        at, ranges = self._file.data_start + wanted.start + low, self._ranges
        if high - low == end - begin:
            ranges.append(ReadRange(at, view))
            self._checks.append((wanted, low, _NOTHING, view, _NOTHING))
            self._end(wanted.name, high - low)
            return
        # It ends inside blocks: its edges go through scratch memory beside it.
        margin = begin - low
        place = self._take(margin + high - end)
        ranges = self._ranges  # perhaps a new one: taking scratch memory may flush
        before = self._scratch.view(place, margin)
        behind = self._scratch.view(place + margin, high - end)
        if margin:
            ranges.append(ReadRange(at, before))
        ranges.append(ReadRange(at + margin, view))
        if high > end:
            ranges.append(ReadRange(at + end - low, behind))
        self._checks.append((wanted, low, before, view, behind))
        self._end(wanted.name, high - low)

    def add_box(self, wanted: Wanted, begin: int, end: int, box: torch.Tensor) -> None:
        """Read bytes ``begin`` to ``end`` of the chunk, which hold ``box`` and what lies between
        its runs, and copy it from there."""
        low, high = begin, end
        if wanted.digests is not None:
            low, high = self._widened(wanted, begin, end)
        place = self._take(high - low)
        view, held = self._scratch.view(place, high - low), self._scratch.tensor(place, high - low)
        self._ranges.append(ReadRange(self._file.data_start + wanted.start + low, view))
        if wanted.digests is not None:
            self._checks.append((wanted, low, _NOTHING, view, _NOTHING))
        strides = strides_of(wanted.sizes)
        self._copies.append(lambda: copy_box(held, begin - low, strides, box))
        self._end(wanted.name, high - low)

    def _widened(self, wanted: Wanted, begin: int, end: int) -> tuple[int, int]:
        """To whole blocks."""
        size = self.block_size
        return begin - begin % size, min(-(-end // size) * size, wanted.nbytes)

    def _end(self, name: str, nbytes: int) -> None:
        """So many bytes were added."""
        self._names.append(name)
        self._held += nbytes
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
            self._end(wanted.name, len(begins) * length)

    def add_block(self, wanted: Wanted, parts: Sequence[BlockPart]) -> None:
        """Read one block of a chunk part by part, into place and into the digest; the block is
        checked when its bytes are where they belong."""
        self.flush()
        if wanted.digests is None:
            raise ValueError("a chunk that is not checked has no blocks")
        digest = xxhash.xxh3_64()
        base = self._file.data_start + wanted.start
        strides = strides_of(wanted.sizes)
        for begin, end, target, boxes in parts:
            nbytes = end - begin
            place = 0 if target is not None else self._take(nbytes)
            view = target if target is not None else self._scratch.view(place, nbytes)
            self._request([ReadRange(base + begin, view)], wanted.name)
            self.bytes_read += nbytes
            digest.update(view)
            for offsets, lengths, first in boxes:
                box = box_of(wanted.tensor, offsets, lengths)
                copy_box(self._scratch.tensor(place, nbytes), first, strides, box)
            self._scratch.release()
        block = parts[0].begin // self.block_size
        if digest.intdigest() != int(wanted.digests[block]):
            self._refuse(wanted, block)

    def _take(self, nbytes: int) -> int:
        place = self._scratch.take(nbytes)
        if place is None:
            self.flush()
            place = self._scratch.take(nbytes)
        if place is None:
            raise MemoryError(f"no scratch memory of {nbytes} bytes")
        return place

    def flush(self) -> None:
        """Read, check and copy what was collected."""
        if not self._ranges:
            return
        # The tensor, if this batch is about one only.
        tensor = self._names[0] if self._names.count(self._names[0]) == len(self._names) else None
        self._request(self._ranges, tensor)
        self.bytes_read += self._held
        for check in self._checks:
            self._compare(*check)
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

    def _compare(
        self, wanted: Wanted, begin: int, before: memoryview, view: memoryview, behind: memoryview
    ) -> None:
        """Check three stretches that follow each other from byte ``begin``, a block border, of the
        chunk."""
        if wanted.digests is None:
            return
        first = begin // self.block_size
        if not before and not behind and view.nbytes <= self.block_size:
            if digest_value(view) != int(wanted.digests[first]):
                self._refuse(wanted, first)
            return
        made = digests_around(before, view, behind, self.block_size)
        expected = wanted.digests[first : first + len(made)].tolist()
        if made != expected:
            pairs = zip_longest(made, expected)
            self._refuse(wanted, first + next(n for n, (a, b) in enumerate(pairs) if a != b))

    def _refuse(self, wanted: Wanted, block: int) -> None:
        begin = block * self.block_size
        end = min(begin + self.block_size, wanted.nbytes)
        base = self._file.data_start + wanted.start
        raise self._files.damaged(self._file, base + begin, base + end, wanted.name)
