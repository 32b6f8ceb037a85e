"""Writes one rank's data files: tensor memory to the store, digests in the same pass.

Belongs here: cutting a file into jobs, and doing them. Does not belong here: what lies where
(``layout``) and when a save is over (``commit``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.errors import InvalidPlanError
from dcp_engine.format.digest import block_count, block_digests, digest_value
from dcp_engine.storage import ByteStore, ByteStoreFile, Check
from storage_backends.block_digester import BlockDigester
from storage_backends.jobs import run_jobs
from storage_backends.layout import FileLayout, Piece
from storage_backends.tensor_bytes import contiguous_slices, has_viewable_memory, memory_of

__all__ = ["WriteOptions", "WrittenFile", "write_file"]

U64 = npt.NDArray[np.uint64]

WRITE_BYTES = 4 << 20
"""Bytes digested, then written, at a time: small enough to be in the cache still."""
WRITE_BUFFERS = 1024
"""Buffers per call: what ``pwritev`` takes."""
COPY_BYTES = 16 << 20
"""Largest copy of what cannot be written from its own memory; one a thread at a time."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How to write."""

    block_size: int
    """Bytes under one digest."""
    threads: int = 1
    job_bytes: int = 64 << 20
    """What one thread writes, about, before it takes the next job; at least two blocks."""


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A data file, written and durable."""

    number: int
    data_start: int
    size: int
    header_digest: int
    blocks: tuple[U64, ...]
    """Per piece, the digests of its blocks."""


class _Part(NamedTuple):
    """Bytes ``begin`` to ``end`` of a piece; ``begin`` is a multiple of the block size."""

    piece: Piece
    begin: int
    end: int
    digests: U64


class _Job(NamedTuple):
    """Parts that follow each other in the file, and where the first one goes."""

    offset: int
    parts: list[_Part]


def write_file(
    store: ByteStore,
    name: str,
    layout: FileLayout,
    header: bytes,
    options: WriteOptions,
    check: Check,
) -> WrittenFile:
    """Write, sync and close file ``name``. On any failure nothing of it remains.

    ``header`` is all that stands before the data section. ``check`` is called before each write.
    Raises ``InvalidPlanError(kind="results_mismatch")`` if the medium holds another number of
    bytes afterwards.
    """
    size = len(header) + layout.data_bytes
    digests = _empty_digests(layout.pieces, options.block_size)
    jobs = list(_cut(layout.pieces, digests, len(header), options))
    check()
    file = store.create(name, size)
    try:
        file.write([memoryview(header)], 0)
        run_jobs(
            jobs,
            lambda job, job_check: _write_job(file, job, options.block_size, job_check),
            threads=options.threads if store.random_write else 1,
            check=check,
        )
        check()
        file.sync()
        file.close()
        _compare_size(store, name, size)
    except BaseException:
        file.abort()
        raise
    return WrittenFile(
        number=layout.number,
        data_start=len(header),
        size=size,
        header_digest=digest_value(header),
        blocks=tuple(digests),
    )


def _compare_size(store: ByteStore, name: str, size: int) -> None:
    found = store.size(name)
    if found != size:
        raise InvalidPlanError(
            f"{size} bytes were written, and the medium holds {found}",
            kind="results_mismatch",
            checkpoint=store.url,
            file=name,
            hint="nothing was committed; check the file system",
        )


def _empty_digests(pieces: Sequence[Piece], block_size: int) -> list[U64]:
    """One array per piece, all in one allocation."""
    counts = [block_count(piece.nbytes, block_size) for piece in pieces]
    together = np.empty(sum(counts), np.uint64)
    ends = np.cumsum([0, *counts]).tolist()
    return [together[begin:end] for begin, end in pairwise(ends)]


def _cut(
    pieces: Sequence[Piece], digests: Sequence[U64], data_start: int, options: WriteOptions
) -> Iterator[_Job]:
    """Jobs of some ``job_bytes``: many small pieces, or a part of a large one. What has to be
    copied first is never cut: each part would copy the whole."""
    parts: list[_Part] = []
    offset = data_start
    held = 0
    for piece, blocks in zip(pieces, digests, strict=True):
        begin = 0
        while begin < piece.nbytes:
            end = piece.nbytes
            if piece.splittable:
                end = min(end, begin + max(options.job_bytes - held, options.job_bytes // 2))
                end = end if end == piece.nbytes else end - end % options.block_size
            first = begin // options.block_size
            last = block_count(end, options.block_size)
            parts.append(_Part(piece, begin, end, blocks[first:last]))
            held += end - begin
            begin = end
            if held >= options.job_bytes:
                yield _Job(offset, parts)
                offset, held, parts = offset + held, 0, []
    if parts:
        yield _Job(offset, parts)


def _write_job(file: ByteStoreFile, job: _Job, block_size: int, check: Check) -> None:
    batch = _Batch(file, job.offset, check)
    for part in job.parts:
        data = part.piece.data()
        view = _whole_view(data, part.piece)
        if view is not None:
            _write_view(batch, view[part.begin : part.end], part.digests, block_size)
        elif isinstance(data, torch.Tensor):
            _write_copies(batch, data, part, block_size)
    batch.flush()


def _whole_view(data: torch.Tensor | memoryview, piece: Piece) -> memoryview | None:
    """The bytes of ``data`` where they lie; None if they lie nowhere in that order."""
    if isinstance(data, memoryview):
        view: memoryview | None = data
    else:
        view = memory_of(data) if has_viewable_memory(data) else None
    nbytes = data.nbytes
    if nbytes != piece.nbytes:
        raise InvalidPlanError(
            f"{piece.nbytes} bytes are planned, and the data holds {nbytes}",
            kind="results_mismatch",
            tensor=piece.name,
            hint="nothing was committed; resolve_data must return what the plan describes",
        )
    return view


def _write_view(batch: _Batch, view: memoryview, digests: U64, block_size: int) -> None:
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
        made = block_digests(part, block_size)
        digests[at : at + len(made)] = made
        batch.add(part, part.nbytes)


def _write_copies(batch: _Batch, data: torch.Tensor, part: _Part, block_size: int) -> None:
    """For tensors that are not contiguous, or not in this memory: copied slice by slice."""
    digester = BlockDigester(part.digests, block_size)
    for copy in contiguous_slices(data, COPY_BYTES):
        view = memory_of(copy)
        for begin in range(0, view.nbytes, WRITE_BYTES):
            part_view = view[begin : begin + WRITE_BYTES]
            digester.update(part_view)
            batch.add(part_view, part_view.nbytes)
        batch.flush()  # so that no more than one copy is held
    digester.finish()


class _Batch:
    """Collects buffers that follow each other, and writes them a few megabytes at a time."""

    def __init__(self, file: ByteStoreFile, offset: int, check: Check) -> None:
        self._file = file
        self._offset = offset
        self._check = check
        self._buffers: list[memoryview] = []
        self._held = 0

    def add(self, view: memoryview, nbytes: int) -> None:
        """The next ``nbytes`` bytes."""
        self._buffers.append(view)
        self._held += nbytes
        if self._held >= WRITE_BYTES or len(self._buffers) >= WRITE_BUFFERS:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._buffers:
            return
        self._check()
        self._file.write(self._buffers, self._offset)
        self._offset += self._held
        self._buffers, self._held = [], 0
