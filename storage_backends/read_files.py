"""Reads stored chunks into tensors, checking every block of bytes before it counts.

Belongs here: which transfers a load is made of, and dividing them among threads. Does not belong
here: reading and checking them (``read_batch``), cutting boxes (``read_plan``) and blocks
(``large_blocks``), and which files are what they claim to be (``checkpoint_files``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from threading import BoundedSemaphore
from typing import NamedTuple

import torch

from dcp_engine.geometry.runs import Runs, box_runs
from dcp_engine.storage import Check
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.jobs import run_jobs
from storage_backends.large_blocks import MAX_WHOLE, BlockPart, parts_of_box, parts_of_run
from storage_backends.read_batch import Batch, Scratch, Wanted
from storage_backends.read_plan import BoxCutter
from storage_backends.tensor_bytes import MemoryViews, box_of, has_viewable_memory, memory_of

__all__ = ["read_wanted"]

READ_BYTES = 2 << 20
"""Bytes read, then checked, at a time: small enough to be in the cache still. A store that is slow
to begin is asked for more."""
UNCHECKED_BYTES = 8 << 20
"""The same where nothing is checked: fewer calls."""
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
"""What one of several threads reads, about, before it takes the next job."""
MIN_JOB = 8 << 20
"""Bytes that are worth a thread: they take a millisecond or two."""


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
        scratch = idle.pop() if idle else Scratch(MAX_SPAN)
        memory = MemoryViews()
        with Batch(files, job.file, job_check, read_bytes, scratch, requests) as batch:
            for source in job.sources:
                if block_size > MAX_WHOLE and source.wanted.digests is not None:
                    for parts in _blocks(source, block_size, read_bytes, span):
                        batch.add_block(source.wanted, parts)
                    continue
                runs = None if slow or source.is_run else _runs_apart(source.wanted)
                if runs is not None:
                    batch.add_runs(source.wanted, runs)
                    continue
                _add(batch, source, memory, cut_bytes // block_size * block_size or block_size)
            batch.flush()
            counts.append(batch.bytes_read)
        idle.append(scratch)

    idle: list[Scratch] = []  # as many as there are threads
    block_size = files.manifest.block_size
    cut_bytes = READ_BYTES if files.verify_digests else UNCHECKED_BYTES
    slow = files.store.preferred_read > READ_BYTES
    nbytes = sum(row.tensor.nbytes for row in wanted)
    if slow:
        preferred = files.store.preferred_read
        job_bytes = max(_even_share(nbytes, threads, preferred, block_size), MIN_REQUEST)
    elif threads > 1:
        job_bytes = max(_even_share(nbytes, threads, JOB_BYTES, block_size), MIN_JOB)
    else:  # a file opened once is read ahead without a break
        job_bytes = max(JOB_BYTES, nbytes)
    read_bytes = job_bytes if slow else cut_bytes
    span = MAX_SPAN if slow else READ_BYTES
    # While one thread checks what came, another one has its place at the store.
    requests = BoundedSemaphore(threads) if slow else nullcontext()
    workers = threads * THREADS_PER_REQUEST if slow else threads
    run_jobs(_jobs(wanted, job_bytes, block_size), run, threads=workers, check=check)
    return sum(counts)


def _even_share(nbytes: int, threads: int, preferred: int, block_size: int) -> int:
    """About ``preferred`` bytes for a job, so that all threads have as many jobs: with jobs of
    just that size, most would wait for the last few."""
    rounds = max(1, round(nbytes / (threads * preferred)))
    return -(-nbytes // (threads * rounds * block_size)) * block_size


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
        if row.run < 0 or not has_viewable_memory(row.tensor):
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
    return tensor.is_cpu and not tensor.is_conj() and not tensor.is_neg()


def _border(position: int, block_size: int) -> int:
    """The border of blocks at or before ``position``."""
    return position - position % block_size


def _runs_apart(wanted: Wanted) -> Runs | None:
    """The runs of a box that are read one by one, if that is better than with what lies between
    them."""
    tensor = wanted.tensor
    if wanted.digests is not None or not has_viewable_memory(tensor):
        return None
    runs = box_runs(wanted.sizes, wanted.within, wanted.lengths, tensor.element_size())
    # The gaps of the innermost step are the smallest.
    if runs.count < 2 or runs.strides[-1] - runs.length < MIN_SKIP:
        return None
    return runs


def _add(batch: Batch, source: _Source, memory: MemoryViews, step: int) -> None:
    """Have ``batch`` read the source, what is one run in pieces of ``step`` bytes."""
    wanted = source.wanted
    tensor = wanted.tensor
    if source.is_run:
        view = memory.of(tensor, tensor.nbytes)
        if source.end - source.begin < view.nbytes:
            view = view[source.begin - wanted.run : source.end - wanted.run]
        _add_run(batch, wanted, source.begin, source.end, view, step)
        return
    # Runs that share a block would each be widened to it, and read it once more.
    max_gap = MAX_GAP if wanted.digests is None else max(MAX_GAP, batch.block_size)
    cutter = BoxCutter(max_span=MAX_SPAN, max_gap=max_gap)
    strides = tensor.stride() if _is_readable(tensor) else None
    for part in cutter.cut(
        wanted.sizes, wanted.within, wanted.lengths, tensor.element_size(), strides
    ):
        box = box_of(tensor, part.begin, part.lengths)
        if part.direct:
            _add_run(batch, wanted, part.first, part.end, memory_of(box), step)
        else:
            batch.add_box(wanted, part.first, part.end, box)


def _add_run(
    batch: Batch, wanted: Wanted, begin: int, end: int, view: memoryview, step: int
) -> None:
    """One run, cut at multiples of ``step`` bytes, which are block borders."""
    if end - begin <= step:
        batch.add_run(wanted, begin, end, view)
        return
    at = begin
    while at < end:
        to = min(end, (at // step + 1) * step)
        batch.add_run(wanted, at, to, view[at - begin : to - begin])
        at = to


def _blocks(source: _Source, block_size: int, step: int, span: int) -> Iterator[list[BlockPart]]:
    """The blocks of a source, each in parts."""
    wanted = source.wanted
    if source.is_run:
        yield from parts_of_run(
            source.begin,
            source.end,
            memory_of(wanted.tensor)[source.begin - wanted.run : source.end - wanted.run],
            nbytes=wanted.nbytes,
            block_size=block_size,
            step=step,
            span=span,
        )
        return
    yield from parts_of_box(
        wanted.sizes,
        wanted.within,
        wanted.lengths,
        itemsize=wanted.tensor.element_size(),
        nbytes=wanted.nbytes,
        block_size=block_size,
        span=span,
    )
