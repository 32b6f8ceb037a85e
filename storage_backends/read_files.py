"""Reads stored chunks into tensors, checking every block of bytes before it counts.

Belongs here: transfers, batches of them, and the scratch memory they share. Does not belong here:
which files are what they claim to be (``checkpoint_files``), and cutting boxes (``read_plan``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import BoundedSemaphore
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.format.digest import block_count, block_digests, digest_value
from dcp_engine.geometry.runs import Runs, box_runs
from dcp_engine.storage import Check, ReadRange
from storage_backends.block_digester import BlockDigester
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.jobs import run_jobs
from storage_backends.read_plan import BoxCutter
from storage_backends.tensor_bytes import copy_box, memory_of

__all__ = ["Wanted", "read_wanted"]

U64 = npt.NDArray[np.uint64]

READ_BYTES = 2 << 20
"""Bytes read, then checked, at a time: small enough to be in the cache still. A store that is slow
to begin is asked for more."""
UNCHECKED_BYTES = 8 << 20
"""The same where nothing is checked: fewer calls."""
READ_RANGES = 1024
"""Ranges per read: what ``preadv`` takes."""
MAX_SPAN = 8 << 20
"""Scratch bytes of one strided part."""
MAX_GAP = 64 << 10
"""Bytes between two runs that are read in vain rather than skipped."""
MIN_SKIP = 4 << 10
"""Bytes between two runs that are skipped where nothing is checked and each run can be read right
where it belongs: a call costs less than so much read in vain, and then copied out of."""
MIN_REQUEST = 256 << 10
"""Bytes below which a request is not divided among threads."""
THREADS_PER_REQUEST = 2
"""Of a store that is slow to begin: one waits for an answer, one checks the answer before."""
JOB_BYTES = 64 << 20
"""What one of several threads reads before it takes the next job."""


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


class _Transfer(NamedTuple):
    """Bytes ``begin`` to ``end`` of a chunk, from one run or from several."""

    wanted: Wanted
    begin: int
    end: int
    direct: memoryview | None
    """Where the bytes belong; None: through scratch memory into ``box``."""
    box: torch.Tensor


class _Source(NamedTuple):
    """What a job reads of a wanted box: all of it, or, of one that is a single run in the chunk and
    in memory, bytes ``begin`` to ``end`` of the chunk."""

    wanted: Wanted
    begin: int
    end: int
    is_run: bool


class _Job(NamedTuple):
    """Sources in one file."""

    file: int
    sources: list[_Source]


def read_wanted(
    files: CheckpointFiles, wanted: Sequence[Wanted], *, threads: int, check: Check
) -> int:
    """Fill every destination; returns the number of bytes read.

    Raises ``DamagedCheckpointError`` for a block that is not what was written, naming file and
    tensor: then the destinations are partly filled.
    """
    counts: list[int] = []

    def run(job: _Job, job_check: Check) -> None:
        scratch = idle.pop() if idle else _Scratch()
        with _Batch(files, job.file, job_check, read_bytes, scratch, requests) as batch:
            for source in job.sources:
                runs = None if slow or source.is_run else _runs_apart(source.wanted)
                if runs is not None:
                    batch.add_runs(source.wanted, runs)
                    continue
                for transfer in _transfers(source, block_size, cut_bytes):
                    batch.add(transfer)
            batch.flush()
            counts.append(batch.bytes_read)
        idle.append(scratch)

    idle: list[_Scratch] = []  # as many as there are threads
    block_size = files.manifest.block_size
    cut_bytes = READ_BYTES if files.verify_digests else UNCHECKED_BYTES
    slow = files.store.preferred_read > READ_BYTES
    if slow:
        job_bytes = _even_share(sum(row.tensor.nbytes for row in wanted), threads, files)
    elif threads > 1:
        job_bytes = JOB_BYTES
    else:  # a file opened once is read ahead without a break
        job_bytes = max(JOB_BYTES, sum(row.tensor.nbytes for row in wanted))
    read_bytes = job_bytes if slow else cut_bytes
    # While one thread checks what came, another one has its place at the store.
    requests = BoundedSemaphore(threads) if slow else nullcontext()
    workers = threads * THREADS_PER_REQUEST if slow else threads
    run_jobs(_jobs(wanted, job_bytes, block_size), run, threads=workers, check=check)
    return sum(counts)


def _even_share(nbytes: int, threads: int, files: CheckpointFiles) -> int:
    """Bytes of a job that is one request, so that all threads have as many jobs, about the size
    that the store prefers: with jobs of just that size, most would wait for the last few."""
    rounds = max(1, round(nbytes / (threads * files.store.preferred_read)))
    block_size = files.manifest.block_size
    share = -(-nbytes // (threads * rounds * block_size)) * block_size
    return max(share, MIN_REQUEST)


def _jobs(wanted: Sequence[Wanted], job_bytes: int, block_size: int) -> Iterator[_Job]:
    """Jobs of about ``job_bytes``; ``wanted`` is sorted by file."""
    sources: list[_Source] = []
    held = 0
    file = -1
    for row in wanted:
        if sources and (row.file != file or held >= job_bytes):
            yield _Job(file, sources)
            sources, held = [], 0
        file = row.file
        nbytes = row.tensor.nbytes
        if row.run < 0 or not (row.tensor.is_contiguous() and _is_readable(row.tensor)):
            sources.append(_Source(row, 0, 0, False))
            held += nbytes
            continue
        begin, stop = row.run, row.run + nbytes
        while begin < stop:
            room = max(job_bytes - held, 0)
            # A cut inside a block would read that block twice.
            end = stop if stop - begin <= room else _border(begin + room, block_size)
            if end <= begin:
                if not sources:
                    end = min(_border(begin + max(job_bytes, block_size), block_size), stop)
                else:
                    yield _Job(file, sources)
                    sources, held = [], 0
                    continue
            sources.append(_Source(row, begin, end, True))
            held += end - begin
            begin = end
    if sources:
        yield _Job(file, sources)


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether stored bytes can be read into the tensor's memory as they are."""
    return tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()


def _border(position: int, block_size: int) -> int:
    """The border of blocks at or before ``position``."""
    return position - position % block_size


def _runs_apart(wanted: Wanted) -> Runs | None:
    """The runs of a box that are read one by one, if that is better than with what lies between
    them."""
    tensor = wanted.tensor
    if wanted.digests is not None or not (tensor.is_contiguous() and _is_readable(tensor)):
        return None
    runs = box_runs(wanted.sizes, wanted.within, wanted.lengths, tensor.element_size())
    # The gaps of the innermost step are the smallest.
    if runs.count < 2 or runs.strides[-1] - runs.length < MIN_SKIP:
        return None
    return runs


def _transfers(source: _Source, block_size: int, cut_bytes: int) -> Iterator[_Transfer]:
    wanted = source.wanted
    tensor = wanted.tensor
    if source.is_run:
        view = memory_of(tensor)
        if source.end - source.begin < view.nbytes:
            view = view[source.begin - wanted.run : source.end - wanted.run]
        step = max(cut_bytes // block_size, 1) * block_size
        yield from _direct(wanted, source.begin, source.end, view, tensor, step)
        return
    # Runs that share a block would each be widened to it, and read it once more.
    cutter = BoxCutter(max_span=MAX_SPAN, max_gap=max(MAX_GAP, block_size))
    strides = tensor.stride() if _is_readable(tensor) else None
    for part in cutter.cut(
        wanted.sizes, wanted.within, wanted.lengths, tensor.element_size(), strides
    ):
        box = tensor
        for d, (begin, length) in enumerate(zip(part.begin, part.lengths, strict=True)):
            if length != box.shape[d]:
                box = box.narrow(d, begin, length)
        if part.direct:
            step = max(cut_bytes // block_size, 1) * block_size
            yield from _direct(wanted, part.first, part.end, memory_of(box), box, step)
        else:
            yield _Transfer(wanted, part.first, part.end, None, box)


def _direct(
    wanted: Wanted, begin: int, end: int, view: memoryview, box: torch.Tensor, step: int
) -> Iterator[_Transfer]:
    """One run, cut at multiples of ``step`` bytes, which are block borders."""
    if end - begin <= step:
        yield _Transfer(wanted, begin, end, view, box)
        return
    at = begin
    while at < end:
        to = min(end, (at // step + 1) * step)
        yield _Transfer(wanted, at, to, view[at - begin : to - begin], box)
        at = to


class _Scratch:
    """Memory that a thread uses again and again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor | None:
        """``nbytes`` that nobody else has, or None if the rest is too little."""
        if self._used + nbytes > self._memory.numel():
            if self._used:
                return None
            # The largest part, with a block to either side.
            self._memory = torch.empty(max(nbytes, MAX_SPAN), dtype=torch.uint8)
        begin = self._used
        # Elements of every size stay aligned.
        self._used += -(-nbytes // 64) * 64
        return self._memory[begin : begin + nbytes]

    def release(self) -> None:
        """All of it is free again."""
        self._used = 0


class _Batch:
    """Collects ranges of one file, reads them at one go, checks them, copies what has to be. A
    context: the file stays open in it, from the first read on."""

    def __init__(
        self,
        files: CheckpointFiles,
        file: int,
        check: Check,
        read_bytes: int,
        scratch: _Scratch,
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

    def add(self, transfer: _Transfer) -> None:
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

    def _add_strided(
        self, wanted: Wanted, begin: int, low: int, high: int, box: torch.Tensor
    ) -> None:
        scratch = self._take(high - low)
        view = memory_of(scratch)
        self._read(wanted, low, view)
        self._checks.append((wanted, low, [view]))
        strides = [1] * len(wanted.sizes)
        for d in range(len(wanted.sizes) - 2, -1, -1):
            strides[d] = strides[d + 1] * wanted.sizes[d + 1]
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
        with self._requests, self._files.reading(self._file.name, tensor=tensor):
            self._check()
            if self._read_file is None:
                self._read_file = self._open.enter_context(self._files.store.opened(self._path))
            self._read_file(self._ranges)
        self.bytes_read += self._held
        for wanted, begin, parts in self._checks:
            if wanted.digests is not None:
                self._compare(wanted, begin, parts)
        for copy in self._copies:
            copy()
        self._ranges, self._held = [], 0
        self._checks, self._copies, self._names = [], [], []
        self._scratch.release()

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
