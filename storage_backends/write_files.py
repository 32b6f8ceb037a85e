"""Writes one rank's data files: tensor memory to the store, digests in the same pass.

Belongs here: cutting a file into jobs, and doing them. Does not belong here: what lies where
(``layout``) and when a save is over (``commit``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.errors import InvalidPlanError
from dcp_engine.format.digest import block_count, block_digests, digest_value
from dcp_engine.storage import ByteStore, ByteStoreFile, Check
from storage_backends.block_digester import BlockDigester
from storage_backends.digest_thread import DigestThread, Undigested
from storage_backends.jobs import run_jobs
from storage_backends.layout import Data, FileLayout
from storage_backends.open_files import OpenFiles
from storage_backends.tensor_bytes import (
    MemoryViews,
    contiguous_slices,
    has_viewable_memory,
    memory_of,
)

__all__ = ["WriteOptions", "WrittenFile", "write_file"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

WRITE_BYTES = 2 << 20
"""Bytes digested and written at a time: small enough to be in the cache still. And few enough that
the kernel's page cache takes them in folios below 2 MiB: on a virtual machine, writes of 4 MiB and
more took several times as long now and then, when memory had been freed in between."""
WRITE_BUFFERS = 1024
"""Buffers per call: what ``pwritev`` takes."""
LARGE_BYTES = 1 << 20
"""From so many bytes on, a piece counts when it is decided how a file is written."""
COPY_BYTES = 16 << 20
"""Largest copy of what cannot be written from its own memory; one a thread at a time."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How to write."""

    block_size: int
    """Bytes under one digest."""
    threads: int = 1
    job_bytes: int = 16 << 20
    """What one thread writes, about, before it takes the next job; at least a block."""
    bypass_cache: bool | None = None
    """Write past a cache that the system shares (``ByteStoreFile.bypass_cache``); None: if the
    save happens beside training."""


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A data file that was written."""

    number: int
    data_start: int
    size: int
    header_digest: int
    blocks: U64
    """The digests of all pieces' blocks, one behind the other."""


class _Job(NamedTuple):
    """Pieces ``first`` to ``last`` of a file; of a single one perhaps only bytes ``begin`` to
    ``end``, both block borders but for the piece's own end."""

    first: int
    last: int
    begin: int
    end: int


class _Plan(NamedTuple):
    """A file, and where everything is."""

    layout: FileLayout
    data_start: int
    starts: I64
    """(P,) first byte of each piece behind ``data_start``."""
    first_blocks: I64
    """(P,) row of each piece's first digest."""
    digests: U64
    block_size: int


def write_file(
    store: ByteStore,
    name: str,
    layout: FileLayout,
    header: bytes,
    options: WriteOptions,
    check: Check,
    wrote: Callable[[int], None],
    files: OpenFiles,
) -> WrittenFile:
    """Write file ``name`` and leave it to ``files`` to end it. On any failure nothing of it
    remains.

    ``header`` is all that stands before the data section. ``check`` is called before each write,
    ``wrote`` after it with the number of bytes, from any of the writing threads.
    """
    plan = _plan(layout, len(header), options.block_size)
    size = len(header) + sum(layout.sizes)
    check()
    file = files.create(name, size)
    try:
        if options.bypass_cache:
            file.bypass_cache()
        file.write([memoryview(header)], 0)
        if _goes_in_order(store, plan, options):
            _write_in_order(file, plan, check, wrote)
        else:
            run_jobs(
                _cut(plan, options.job_bytes),
                lambda job, job_check: _write_job(file, plan, job, job_check, wrote),
                threads=options.threads if store.random_write else 1,
                check=check,
            )
        check()
    except BaseException:
        file.abort()
        raise
    files.add(name, file, size)
    return WrittenFile(
        number=layout.number,
        data_start=len(header),
        size=size,
        header_digest=digest_value(header),
        blocks=plan.digests,
    )


def _plan(layout: FileLayout, data_start: int, block_size: int) -> _Plan:
    sizes = np.array(layout.sizes, np.int64)
    blocks = -(-sizes // block_size)
    return _Plan(
        layout=layout,
        data_start=data_start,
        starts=np.cumsum(sizes) - sizes,
        first_blocks=np.cumsum(blocks) - blocks,
        digests=np.empty(int(blocks.sum()), np.uint64),
        block_size=block_size,
    )


def _goes_in_order(store: ByteStore, plan: _Plan, options: WriteOptions) -> bool:
    """Whether one thread writes the file from begin to end, and another digests: where more
    writers gain nothing, and all that is large can be written from its own memory. What has to be
    copied first is worth several threads that copy."""
    if options.threads == 1 or store.concurrent_writes:
        return False
    large = np.flatnonzero(np.array(plan.layout.sizes, np.int64) >= LARGE_BYTES).tolist()
    return bool(large) and all(_lies_in_memory(plan.layout.data[row]) for row in large)


def _lies_in_memory(data: Data) -> bool:
    if isinstance(data, torch.Tensor):
        return has_viewable_memory(data)
    return isinstance(data, memoryview)


def _write_in_order(
    file: ByteStoreFile, plan: _Plan, check: Check, wrote: Callable[[int], None]
) -> None:
    with DigestThread(plan.block_size) as digests:
        everything = _Job(0, len(plan.layout.sizes), 0, 0)
        _write_job(file, plan, everything, check, wrote, digests)
        digests.finish()


def _cut(plan: _Plan, job_bytes: int) -> Iterator[_Job]:
    """Jobs of some ``job_bytes``: many small pieces, or a part of a large one. What has to be
    copied first is never cut: each part would copy the whole. What has to be resolved neither."""
    sizes = np.array(plan.layout.sizes, np.int64)
    ends = plan.starts + sizes
    large = [*np.flatnonzero(sizes >= job_bytes).tolist(), len(sizes)]
    row = 0
    for stop in large:
        while row < stop:  # pieces that are all smaller than a job
            last = int(np.searchsorted(ends, plan.starts[row] + job_bytes, side="right"))
            last = min(max(last, row + 1), stop)
            yield _Job(row, last, 0, 0)
            row = last
        if row < len(sizes):
            yield from _cut_large(plan, row, job_bytes)
            row += 1


def _cut_large(plan: _Plan, row: int, job_bytes: int) -> Iterator[_Job]:
    data, nbytes = plan.layout.data[row], plan.layout.sizes[row]
    step = max(job_bytes // plan.block_size, 1) * plan.block_size
    if (isinstance(data, torch.Tensor) and not has_viewable_memory(data)) or callable(data):
        step = nbytes
    # The last part may be half as long again, rather than very short.
    begin = 0
    while nbytes - begin > step + step // 2:
        yield _Job(row, row + 1, begin, begin + step)
        begin += step
    yield _Job(row, row + 1, begin, nbytes)


def _write_job(
    file: ByteStoreFile,
    plan: _Plan,
    job: _Job,
    check: Check,
    wrote: Callable[[int], None],
    others: DigestThread | None = None,
) -> None:
    """Write and digest; with ``others`` the digests of what is large and stays in memory are
    there only when that is done."""
    first, last, begin, end = job
    layout, block_size = plan.layout, plan.block_size
    at = plan.data_start + int(plan.starts[first]) + begin
    batch = _Batch(file, at, check, wrote, others)
    if end:
        _write_piece(batch, plan, first, begin, end)
        batch.flush()
        return
    for begin, end in _groups(plan, first, last):
        views = _small_views(layout.data[begin:end], layout.sizes[begin:end], block_size)
        if views is None:
            for row in range(begin, end):
                _write_piece(batch, plan, row, 0, layout.sizes[row])
            continue
        at = int(plan.first_blocks[begin])
        plan.digests[at : at + len(views)] = list(map(digest_value, views))
        batch.extend(views, int(plan.starts[end - 1] - plan.starts[begin]) + layout.sizes[end - 1])
    batch.flush()


def _groups(plan: _Plan, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Pieces ``first`` to ``last`` in stretches that fit into one call."""
    while first < last:
        end = int(np.searchsorted(plan.starts, plan.starts[first] + WRITE_BYTES, side="right")) - 1
        end = min(max(end, first + 1), first + WRITE_BUFFERS, last)
        yield first, end
        first = end


def _small_views(
    data: Sequence[Data], sizes: Sequence[int], block_size: int
) -> list[memoryview] | None:
    """The memory of pieces of one block or less each; None if one of them is anything else. Of
    these there may be a hundred thousand."""
    memory = MemoryViews()
    views: list[memoryview] = []
    for piece, nbytes in zip(data, sizes, strict=True):
        if not (
            type(piece) is torch.Tensor
            and 0 < nbytes <= block_size
            and nbytes == piece.nbytes
            and has_viewable_memory(piece)
        ):
            return None
        views.append(memory.of(piece, nbytes))
    return views


def _write_piece(batch: _Batch, plan: _Plan, row: int, begin: int, end: int) -> None:
    """Bytes ``begin`` (a block border) to ``end`` of one piece."""
    data = _resolved(plan.layout, row)
    stays = data is plan.layout.data[row]
    at = int(plan.first_blocks[row]) + begin // plan.block_size
    digests = plan.digests[at : at + block_count(end - begin, plan.block_size)]
    if isinstance(data, memoryview):
        _write_view(batch, data[begin:end], digests, plan.block_size, stays)
    elif has_viewable_memory(data):
        _write_view(batch, memory_of(data)[begin:end], digests, plan.block_size, stays)
    else:
        _write_copies(batch, data, digests, plan.block_size)


def _resolved(layout: FileLayout, row: int) -> torch.Tensor | memoryview:
    data: Data = layout.data[row]
    if not isinstance(data, torch.Tensor | memoryview):
        data = data()
    if data.nbytes != layout.sizes[row]:
        raise InvalidPlanError(
            f"{layout.sizes[row]} bytes are planned, and the data holds {data.nbytes}",
            kind="results_mismatch",
            tensor=layout.names[row],
            hint="nothing was committed; resolve_data must return what the plan describes",
        )
    return data


def _write_view(
    batch: _Batch, view: memoryview, digests: U64, block_size: int, stays: bool
) -> None:
    """``stays``: the memory lives until the save is over, whoever looks at it."""
    nbytes = view.nbytes
    if nbytes <= block_size:
        if nbytes:
            digests[0] = digest_value(view)
            batch.add(view, nbytes)
        return
    step = max(WRITE_BYTES // block_size, 1) * block_size
    for begin in range(0, nbytes, step):
        part = view[begin : begin + step]
        at = begin // block_size
        out = digests[at : at + block_count(part.nbytes, block_size)]
        if not (stays and batch.leaves((part, out))):
            out[:] = block_digests(part, block_size)
        batch.add(part, part.nbytes)


def _write_copies(batch: _Batch, data: torch.Tensor, digests: U64, block_size: int) -> None:
    """For tensors that are not contiguous, or not in this memory: copied slice by slice."""
    digester = BlockDigester(digests, block_size)
    for copy in contiguous_slices(data, COPY_BYTES):
        _write_copy(batch, memory_of(copy), digester)
        del copy  # before the next is made: no more than one is held
    digester.finish()


def _write_copy(batch: _Batch, view: memoryview, digester: BlockDigester) -> None:
    for begin in range(0, view.nbytes, WRITE_BYTES):
        part = view[begin : begin + WRITE_BYTES]
        digester.update(part)
        batch.add(part, part.nbytes)
    batch.flush()


class _Batch:
    """Collects buffers that follow each other, and writes them a few megabytes at a time."""

    def __init__(
        self,
        file: ByteStoreFile,
        offset: int,
        check: Check,
        wrote: Callable[[int], None],
        others: DigestThread | None,
    ) -> None:
        self._file = file
        self._offset = offset
        self._check = check
        self._wrote = wrote
        self._others = others
        self._buffers: list[memoryview] = []
        self._held = 0
        self._undigested: list[Undigested] = []

    def leaves(self, work: Undigested) -> bool:
        """Whether another thread digests ``work``, which is to be added next."""
        if self._others is None:
            return False
        self._undigested.append(work)
        return True

    def add(self, view: memoryview, nbytes: int) -> None:
        """The next ``nbytes`` bytes."""
        self._buffers.append(view)
        self._held += nbytes
        if self._held >= WRITE_BYTES or len(self._buffers) >= WRITE_BUFFERS:
            self.flush()

    def extend(self, views: list[memoryview], nbytes: int) -> None:
        """The next ``nbytes`` bytes, no more than one call writes."""
        if self._held + nbytes > WRITE_BYTES or len(self._buffers) + len(views) > WRITE_BUFFERS:
            self.flush()
        self._buffers += views
        self._held += nbytes
        if self._held >= WRITE_BYTES or len(self._buffers) >= WRITE_BUFFERS:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._buffers:
            return
        self._check()
        if self._others is not None and self._undigested:
            self._others.add(self._undigested)
            self._undigested = []
        self._file.write(self._buffers, self._offset)
        self._offset += self._held
        self._wrote(self._held)
        self._buffers, self._held = [], 0
