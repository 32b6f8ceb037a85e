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
from dcp_engine.planning.columns import LoadColumns
from dcp_engine.storage import Check, ReadRange
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.digest_rows import digest_rows
from storage_backends.jobs import run_jobs
from storage_backends.tensor_bytes import MemoryViews, has_viewable_memory

__all__ = ["SmallRows", "read_small", "small_rows"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

JOB_BYTES = 4 << 20
"""Bytes read, then checked, at a time: small enough to be in the cache still."""
JOB_ROWS = 1024
"""Rows per read: what ``preadv`` takes."""


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
    nbytes = plan.itemsize * plan.chunk_sizes.prod(axis=1)
    is_small = (nbytes <= files.manifest.block_size) & (nbytes > 0)
    is_small &= (plan.lengths == plan.chunk_sizes).all(axis=1) & (plan.within == 0).all(axis=1)
    kept: list[int] = []
    taken: list[torch.Tensor] = []
    stored: list[tuple[str, tuple[int, ...]]] = []
    known: dict[tuple[torch.dtype, tuple[int, ...], int], tuple[str, tuple[int, ...]]] = {}
    rows = np.flatnonzero(is_small)
    for row, dest, ndim, itemsize, size, sizes in zip(
        rows.tolist(),
        plan.dest[rows].tolist(),
        plan.ndims[rows].tolist(),
        plan.itemsize[rows].tolist(),
        nbytes[rows].tolist(),
        map(tuple, plan.chunk_sizes[rows].tolist()),
        strict=True,
    ):
        tensor = tensors[dest]
        dtype = tensor.dtype
        # A destination that does not fit is refused where the others are.
        if tensor.nbytes != size or dtype.itemsize != itemsize or not has_viewable_memory(tensor):
            continue
        entry = known.get((dtype, sizes, ndim))
        if entry is None:
            entry = known[dtype, sizes, ndim] = stored_shape(info(code_of(dtype)), sizes[:ndim])
        kept.append(row)
        taken.append(tensor)
        stored.append(entry)
    is_small[:] = False
    is_small[kept] = True
    names = [plan.names[row] for row in plan.tensor[kept].tolist()]
    small = SmallRows(
        file=plan.file[kept].astype(np.int64),
        start=plan.chunk_start[kept],
        nbytes=nbytes[kept],
        names=names,
        tensors=taken,
        digests=None,
    )
    _compare_headers(files, small, stored)
    return _with_digests(files, small), np.flatnonzero(~is_small)


def _compare_headers(
    files: CheckpointFiles, rows: SmallRows, stored: Sequence[tuple[str, tuple[int, ...]]]
) -> None:
    for begin, end in _of_one_file(rows.file):
        files.compare_entries(
            int(rows.file[begin]),
            rows.start[begin:end].tolist(),
            stored[begin:end],
            rows.nbytes[begin:end].tolist(),
            rows.names[begin:end],
        )


def _of_one_file(file: I64) -> Iterator[tuple[int, int]]:
    """Begins and ends of the stretches of one file each."""
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
    run_jobs(
        _jobs(rows),
        lambda job, job_check: _read_job(files, rows, *job, job_check),
        threads=threads,
        check=check,
    )
    return int(rows.nbytes.sum())


def _jobs(rows: SmallRows) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(rows.nbytes)
    for begin, stop in _of_one_file(rows.file):
        while begin < stop:
            held = int(ends[begin] - rows.nbytes[begin])
            end = int(np.searchsorted(ends, held + JOB_BYTES, side="right"))
            end = min(max(end, begin + 1), begin + JOB_ROWS, stop)
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
