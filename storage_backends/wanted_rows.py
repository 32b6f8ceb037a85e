"""Load plans as wanted boxes, each compared with header and digests of its file.

Belongs here: the one way from both faces' plans to what ``read_files`` takes. Does not belong
here: reading tensor data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.errors import DamagedCheckpointError, InvalidPlanError, StateMismatchError
from dcp_engine.format.digest import DigestTable
from dcp_engine.format.dtypes import code_of, info, stored_shape
from dcp_engine.planning.columns import LoadColumns
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.item_reads import WantedItem
from storage_backends.read_files import Wanted
from storage_backends.tensor_bytes import box_of

__all__ = ["checked", "wanted_of_columns", "wanted_of_items"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


def wanted_of_columns(
    plan: LoadColumns, tensors: Sequence[torch.Tensor], *, checkpoint: str
) -> list[Wanted]:
    """One box per row of ``plan``, in its order."""
    wanted: list[Wanted] = []
    for tensor_row, ndim, itemsize, file, start, sizes, within, lengths, dest, dest_within in zip(
        plan.tensor.tolist(),
        plan.ndims.tolist(),
        plan.itemsize.tolist(),
        plan.file.tolist(),
        plan.chunk_start.tolist(),
        plan.chunk_sizes.tolist(),
        plan.within.tolist(),
        plan.lengths.tolist(),
        plan.dest.tolist(),
        plan.dest_within.tolist(),
        strict=True,
    ):
        name, tensor = plan.names[tensor_row], tensors[dest]
        if tensor.ndim != ndim or tensor.element_size() != itemsize:
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
                within=tuple(within[:ndim]),
                lengths=tuple(lengths[:ndim]),
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
    shapes: dict[torch.dtype, int] = {}
    for row in wanted:
        dtype = row.tensor.dtype
        code = shapes.get(dtype)
        if code is None:
            code = shapes[dtype] = code_of(dtype)
        name, shape = stored_shape(info(code), row.sizes)
        files.compare_entry(row.file, row.start, name, shape, row.nbytes, row.name)
    if not files.verify_digests:
        return list(wanted)
    digests = _digests(files, wanted)
    return [row._replace(digests=blocks) for row, blocks in zip(wanted, digests, strict=True)]


def _digests(files: CheckpointFiles, wanted: Sequence[Wanted]) -> list[U64]:
    """Each chunk's block digests; looked up for all chunks of a rank at once."""
    entries = files.manifest.data_files
    rank = np.array([entries[row.file].rank for row in wanted], np.int64)
    number = np.array([entries[row.file].number for row in wanted], np.int64)
    start = np.array([row.start for row in wanted], np.int64)
    nbytes = np.array([row.nbytes for row in wanted], np.int64)
    found: list[U64] = [np.empty(0, np.uint64)] * len(wanted)
    for of_rank in np.unique(rank).tolist():
        rows = np.flatnonzero(rank == of_rank)
        table = files.table(of_rank)
        at = _rows_of(files, table, of_rank, number[rows], start[rows])
        _compare_sizes(files, wanted, rows, table.nbytes[at], nbytes[rows])
        begins, ends = table.first_block[at].tolist(), table.first_block[at + 1].tolist()
        for row, begin, end in zip(rows.tolist(), begins, ends, strict=True):
            found[row] = table.blocks[begin:end]
    return found


def _rows_of(files: CheckpointFiles, table: DigestTable, rank: int, number: I64, start: I64) -> I64:
    try:
        return table.rows(number, start)
    except DamagedCheckpointError as error:
        name = files.manifest.digest_file(rank).name
        error.with_context(checkpoint=files.store.url, file=files.path(name))
        raise


def _compare_sizes(
    files: CheckpointFiles,
    wanted: Sequence[Wanted],
    rows: npt.NDArray[np.intp],
    stored: I64,
    nbytes: I64,
) -> None:
    differ = np.flatnonzero(stored != nbytes)
    if not len(differ):
        return
    row = wanted[int(rows[int(differ[0])])]
    raise DamagedCheckpointError(
        f"the digests are of a chunk of {int(stored[int(differ[0])])} bytes, the manifest has "
        f"{row.nbytes}",
        kind="digest_mismatch",
        checkpoint=files.store.url,
        file=files.path(files.manifest.data_files[row.file].name),
        tensor=row.name,
        hint="take another checkpoint",
    )
