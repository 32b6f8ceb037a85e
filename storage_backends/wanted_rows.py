"""Load plans as wanted boxes, each compared with header and digests of its file.

Belongs here: the one way from both faces' plans to what ``read_files`` takes. Does not belong
here: reading tensor data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.collector import collector_paused
from dcp_engine.errors import InvalidPlanError, StateMismatchError
from dcp_engine.format.dtypes import code_of, info, stored_shape
from dcp_engine.format.shard_file import Stored
from dcp_engine.planning.columns import LoadColumns
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.digest_rows import digest_rows
from storage_backends.item_reads import WantedItem
from storage_backends.read_files import Wanted
from storage_backends.small_reads import SmallRows, small_rows
from storage_backends.tensor_bytes import box_of

__all__ = ["WantedColumns", "checked", "wanted_of_columns", "wanted_of_items"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class WantedColumns:
    """The rows of a load plan, by how they are read."""

    small: SmallRows
    boxes: list[Wanted]


@collector_paused()
def wanted_of_columns(
    files: CheckpointFiles, plan: LoadColumns, tensors: Sequence[torch.Tensor]
) -> WantedColumns:
    """The rows of ``plan``, compared with headers and digests.

    Raises ``DamagedCheckpointError``, ``ConflictError(kind="superseded")``, or
    ``StateMismatchError(kind="dtype_mismatch")``.
    """
    small, rest = small_rows(files, plan, tensors)
    boxes = checked(files, _boxes_of(plan, rest, tensors, checkpoint=files.store.url))
    if plan.flat is not None:
        boxes = [_flattened(row) for row in boxes]
    return WantedColumns(small=small, boxes=boxes)


def _flattened(row: Wanted) -> Wanted:
    """A range of elements as a box of a chunk of one dimension."""
    if len(row.within) == len(row.sizes):
        return row
    return row._replace(sizes=(math.prod(row.sizes),))


def _boxes_of(
    plan: LoadColumns, rows: I64, tensors: Sequence[torch.Tensor], *, checkpoint: str
) -> list[Wanted]:
    """One box per row of ``rows``, in their order."""
    wanted: list[Wanted] = []
    flat = None if plan.flat is None else plan.flat[rows].tolist()
    for tensor_row, ndim, itemsize, file, start, sizes, within, lengths, dest, dest_within in zip(
        plan.tensor[rows].tolist(),
        plan.ndims[rows].tolist(),
        plan.itemsize[rows].tolist(),
        plan.file[rows].tolist(),
        plan.chunk_start[rows].tolist(),
        plan.chunk_sizes[rows].tolist(),
        plan.within[rows].tolist(),
        plan.lengths[rows].tolist(),
        plan.dest[rows].tolist(),
        plan.dest_within[rows].tolist(),
        strict=True,
    ):
        name, tensor = plan.names[tensor_row], tensors[dest]
        dims = ndim if flat is None or not flat[len(wanted)] else 1
        if tensor.ndim != dims or tensor.element_size() != itemsize:
            raise StateMismatchError(
                f"{itemsize} bytes an element in {ndim} dimensions are stored, the destination "
                f"is {tensor.dtype} of shape {tuple(tensor.shape)}",
                kind="dtype_mismatch",
                checkpoint=checkpoint,
                tensor=name,
            )
        box = box_of(tensor.detach(), dest_within, lengths)
        chunk = tuple(sizes[:ndim])
        nbytes = itemsize
        for size in chunk:
            nbytes *= size
        wanted.append(
            Wanted(
                name=name,
                file=file,
                start=start,
                nbytes=nbytes,
                sizes=chunk,
                within=tuple(within[:dims]),
                lengths=tuple(lengths[:dims]),
                tensor=box,
                digests=None,
            )
        )
    return wanted


def wanted_of_items(items: Sequence[WantedItem], *, checkpoint: str) -> list[Wanted]:
    """One box per item, sorted by file and position."""
    wanted: list[Wanted] = []
    for want in items:
        stored, chunks, at = want.stored, want.stored.chunks, want.chunk
        if want.tensor.dtype != stored.dtype:
            raise StateMismatchError(
                f"{stored.dtype} is stored, the planner gave a tensor of {want.tensor.dtype}",
                kind="dtype_mismatch",
                checkpoint=checkpoint,
                tensor=stored.name,
                hint="resolve to a tensor of the stored dtype, and convert in commit_tensor",
            )
        sizes = tuple(chunks.sizes[at].tolist())
        within, lengths = tuple(want.item.storage_offsets), tuple(want.item.lengths)
        ends = [w + n for w, n in zip(within, lengths, strict=True)]
        if len(within) != len(sizes) or any(e > s for e, s in zip(ends, sizes, strict=True)):
            raise InvalidPlanError(
                f"the box at {within} of {lengths} leaves the chunk of {sizes}",
                kind="plan_overlap",
                checkpoint=checkpoint,
                tensor=stored.name,
            )
        wanted.append(
            Wanted(
                name=stored.name,
                file=int(chunks.file[at]),
                start=int(chunks.start[at]),
                nbytes=int(chunks.nbytes[at]),
                sizes=sizes,
                within=within,
                lengths=lengths,
                tensor=want.tensor.detach(),
                digests=None,
            )
        )
    wanted.sort(key=lambda row: (row.file, row.start))
    return wanted


def checked(files: CheckpointFiles, wanted: Sequence[Wanted]) -> list[Wanted]:
    """``wanted`` with digests, each chunk found to be what its file's header says it is.

    Raises ``DamagedCheckpointError``, or ``ConflictError(kind="superseded")``.
    """
    codes: dict[torch.dtype, int] = {}
    stored: dict[Stored, int] = {}
    kinds = np.empty(len(wanted), np.int64)
    for at, row in enumerate(wanted):
        dtype = row.tensor.dtype
        code = codes.get(dtype)
        if code is None:
            code = codes[dtype] = code_of(dtype)
        kinds[at] = stored.setdefault(stored_shape(info(code), row.sizes), len(stored))
    begin = 0
    for file, group in groupby(wanted, key=lambda row: row.file):
        rows = list(group)
        end = begin + len(rows)
        files.compare_entries(
            file,
            np.array([row.start for row in rows], np.int64),
            np.array([row.nbytes for row in rows], np.int64),
            list(stored),
            kinds[begin:end],
            [row.name for row in rows],
        )
        begin = end
    if not files.verify_digests:
        return list(wanted)
    found: list[U64] = [np.empty(0, np.uint64)] * len(wanted)
    for part in digest_rows(
        files,
        np.array([row.file for row in wanted], np.int64),
        np.array([row.start for row in wanted], np.int64),
        np.array([row.nbytes for row in wanted], np.int64),
        [row.name for row in wanted],
    ):
        table = part.table
        begins, ends = table.first_block[part.at].tolist(), table.first_block[part.at + 1].tolist()
        for at, first, last in zip(part.rows.tolist(), begins, ends, strict=True):
            found[at] = table.blocks[first:last]
    return [row._replace(digests=blocks) for row, blocks in zip(wanted, found, strict=True)]
