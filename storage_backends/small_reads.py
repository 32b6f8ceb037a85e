"""Whole chunks of one block or less, read into contiguous tensors: what there may be many of.

Belongs here: the same as in ``read_files``, for this one case, as columns: some microseconds a
tensor, where the general way takes tens. Does not belong here: any other box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.format.digest import digest_value
from dcp_engine.format.dtypes import code_of, info, stored_shape
from dcp_engine.format.shard_file import Stored
from dcp_engine.geometry.columns import group_rows
from dcp_engine.planning.arrays import all_rows, row_products
from dcp_engine.planning.columns import LoadColumns
from dcp_engine.storage import Check, ReadRange
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.digest_rows import digest_rows
from storage_backends.jobs import run_jobs
from storage_backends.tensor_bytes import MemoryViews, has_viewable_memory

__all__ = ["SmallRows", "read_small", "small_rows", "stored_kinds", "stretches"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

JOB_BYTES = 4 << 20
"""Bytes read, then checked, at a time: small enough to be in the cache still."""
JOB_ROWS = 1024
"""Rows per read: what ``preadv`` takes."""
SLOW_ROWS = 16 * JOB_ROWS
"""Rows per read of a store that is slow to begin."""
SLOW_RUN = 256
"""Rows one behind the other that are worth requests of their own there."""
LONG_RUN = 16
"""The same elsewhere. Rows that lie scattered among large chunks are read along with those: a disk
would seek each of them, and then find its read-ahead broken (a cold load took twice as long)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SmallRows:
    """S chunks, in the order of the plan: by file, then by position."""

    file: I64
    """(S,) rows of the manifest's data files."""
    start: I64
    """(S,) behind the begin of the file's data section."""
    nbytes: I64
    names: list[str]
    tensors: list[torch.Tensor]
    digests: U64 | None
    """(S,) one each; None: do not check."""


def small_rows(
    files: CheckpointFiles, plan: LoadColumns, tensors: Sequence[torch.Tensor]
) -> tuple[SmallRows, I64]:
    """The rows of ``plan`` that are such chunks, compared with headers and digests; and the
    others.

    Raises ``DamagedCheckpointError``, or ``ConflictError(kind="superseded")``.
    """
    nbytes = plan.itemsize * row_products(plan.chunk_sizes)
    is_small = (nbytes <= files.manifest.block_size) & (nbytes > 0)
    is_small &= all_rows((plan.lengths == plan.chunk_sizes) & (plan.within == 0))
    slow = files.store.preferred_read > JOB_BYTES
    is_small &= _among_their_like(plan, nbytes, is_small, SLOW_RUN if slow else LONG_RUN)
    rows = np.flatnonzero(is_small)
    taken = [tensors[dest] for dest in plan.dest[rows].tolist()]
    dtypes = [tensor.dtype for tensor in taken]
    by_dtype = {dtype: code_of(dtype) for dtype in set(dtypes)}
    codes = np.fromiter(map(by_dtype.__getitem__, dtypes), np.int64, len(rows))
    sizes = np.zeros(max(by_dtype.values(), default=-1) + 1, np.int64)
    for dtype, code in by_dtype.items():
        sizes[code] = dtype.itemsize
    # A destination that does not fit is refused where the others are.
    fits = np.fromiter(map(has_viewable_memory, taken), np.bool_, len(rows))
    fits &= np.array([tensor.nbytes for tensor in taken], np.int64) == nbytes[rows]
    fits &= sizes[codes] == plan.itemsize[rows]
    if not fits.all():
        taken = [tensors[dest] for dest in plan.dest[rows[fits]].tolist()]
        rows, codes = rows[fits], codes[fits]
    names = [plan.names[row] for row in plan.tensor[rows].tolist()]
    small = SmallRows(
        file=plan.file[rows].astype(np.int64),
        start=plan.chunk_start[rows],
        nbytes=nbytes[rows],
        names=names,
        tensors=taken,
        digests=None,
    )
    ndims, shapes = plan.ndims[rows].astype(np.int64), plan.chunk_sizes[rows]
    _compare_headers(files, small, *stored_kinds(codes, ndims, shapes))
    others = np.ones(len(nbytes), np.bool_)
    others[rows] = False
    return _with_digests(files, small), np.flatnonzero(others)


def _among_their_like(plan: LoadColumns, nbytes: I64, is_small: Mask, long_run: int) -> Mask:
    """Which small rows lie in a run of at least ``long_run`` small ones. Others are read along with
    the large chunks beside them."""
    follows = np.zeros(len(nbytes), np.bool_)
    follows[1:] = (
        (plan.chunk_start[1:] == plan.chunk_start[:-1] + nbytes[:-1])
        & (plan.file[1:] == plan.file[:-1])
        & is_small[:-1]
    )
    run = np.cumsum(~(follows & is_small))
    return np.bincount(run, weights=is_small)[run] >= long_run


def stored_kinds(codes: I64, ndims: I64, sizes: I64) -> tuple[list[Stored], I64]:
    """The different dtypes and shapes of n chunks, as headers list them, and each chunk's.

    Args:
        codes: (n,) of ``format.dtypes``.
        ndims: (n,)
        sizes: (n, D) shapes, padded.
    """
    if not len(codes):
        return [], codes
    kinds, count = group_rows([codes, ndims, *sizes.T])
    example = np.empty(count, np.int64)
    example[kinds] = np.arange(len(kinds))
    stored = [
        stored_shape(info(code), tuple(shape[:ndim]))
        for code, ndim, shape in zip(
            codes[example].tolist(), ndims[example].tolist(), sizes[example].tolist(), strict=True
        )
    ]
    return stored, kinds


def _compare_headers(
    files: CheckpointFiles, rows: SmallRows, stored: list[Stored], kinds: I64
) -> None:
    for begin, end in stretches(rows.file):
        files.compare_entries(
            int(rows.file[begin]),
            rows.start[begin:end],
            rows.nbytes[begin:end],
            stored,
            kinds[begin:end],
            rows.names[begin:end],
        )


def stretches(file: I64) -> Iterator[tuple[int, int]]:
    """Begins and ends of the stretches of one file each, of rows sorted by file."""
    borders = [0, *(np.flatnonzero(np.diff(file)) + 1).tolist(), len(file)]
    return ((a, b) for a, b in pairwise(borders) if a < b)


def _with_digests(files: CheckpointFiles, rows: SmallRows) -> SmallRows:
    if not files.verify_digests:
        return rows
    digests = np.empty(len(rows.file), np.uint64)
    for part in digest_rows(files, rows.file, rows.start, rows.nbytes, rows.names):
        digests[part.rows] = part.table.blocks[part.table.first_block[part.at]]
    return SmallRows(**{**vars(rows), "digests": digests})


def read_small(files: CheckpointFiles, rows: SmallRows, *, threads: int, check: Check) -> int:
    """Fill the tensors; returns the number of bytes read.

    Raises ``DamagedCheckpointError`` for a chunk that is not what was written, naming file and
    tensor: then the destinations are partly filled.
    """
    job_bytes, job_rows = JOB_BYTES, JOB_ROWS
    if files.store.preferred_read > JOB_BYTES:
        job_bytes, job_rows = files.store.preferred_read, SLOW_ROWS
    run_jobs(
        _jobs(rows, job_bytes, job_rows),
        lambda job, job_check: _read_job(files, rows, *job, job_check),
        threads=threads,
        check=check,
    )
    return int(rows.nbytes.sum())


def _jobs(rows: SmallRows, job_bytes: int, job_rows: int) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(rows.nbytes)
    for begin, stop in stretches(rows.file):
        while begin < stop:
            held = int(ends[begin] - rows.nbytes[begin])
            end = int(np.searchsorted(ends, held + job_bytes, side="right"))
            end = min(max(end, begin + 1), begin + job_rows, stop)
            yield begin, end
            begin = end


def _read_job(files: CheckpointFiles, rows: SmallRows, begin: int, end: int, check: Check) -> None:
    check()
    file = files.manifest.data_files[int(rows.file[begin])]
    memory = MemoryViews()
    sizes = rows.nbytes[begin:end].tolist()
    views = [
        memory.of(tensor, size) for tensor, size in zip(rows.tensors[begin:end], sizes, strict=True)
    ]
    offsets = (rows.start[begin:end] + file.data_start).tolist()
    name = rows.names[begin] if end - begin == 1 else None
    with files.reading(file.name, tensor=name):
        files.store.read(files.path(file.name), list(map(ReadRange, offsets, views)))
    if rows.digests is None:
        return
    made = np.array(list(map(digest_value, views)), np.uint64)
    differ = np.flatnonzero(made != rows.digests[begin:end])
    if len(differ):
        at = int(differ[0])
        raise files.damaged(file, offsets[at], offsets[at] + sizes[at], rows.names[begin + at])
