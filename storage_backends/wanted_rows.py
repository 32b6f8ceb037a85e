"""Load plans as wanted boxes, each compared with header and digests of its file.

Belongs here: the one way from both faces' plans to what ``read_files`` takes. Does not belong
here: reading tensor data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.collector import collector_paused
from dcp_engine.errors import InvalidPlanError, StateMismatchError
from dcp_engine.format.dtypes import code_of, info, stored_shape
from dcp_engine.format.shard_file import Stored
from dcp_engine.geometry.runs import box_runs
from dcp_engine.planning.arrays import row_products
from dcp_engine.planning.columns import LoadColumns
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.digest_rows import digest_rows
from storage_backends.item_reads import WantedItem
from storage_backends.read_batch import Wanted
from storage_backends.small_reads import SmallRows, small_rows, stored_kinds, stretches
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
    return WantedColumns(small=small, boxes=_boxes_of(files, plan, rest, tensors))


def _boxes_of(
    files: CheckpointFiles, plan: LoadColumns, rows: I64, tensors: Sequence[torch.Tensor]
) -> list[Wanted]:
    """One box per row of ``rows``, in their order."""
    names = [plan.names[row] for row in plan.tensor[rows].tolist()]
    taken = [tensors[dest] for dest in plan.dest[rows].tolist()]
    sizes, itemsize = plan.chunk_sizes[rows], plan.itemsize[rows]
    within, lengths = plan.within[rows], plan.lengths[rows]
    ndims = plan.ndims[rows].astype(np.int64)
    flat = np.zeros(len(rows), np.bool_) if plan.flat is None else plan.flat[rows]
    dims = np.where(flat, 1, ndims)
    codes = _codes_of(taken, names, dims, ndims, itemsize, checkpoint=files.store.url)
    file, start = plan.file[rows].astype(np.int64), plan.chunk_start[rows]
    nbytes = row_products(sizes) * itemsize
    kinds = stored_kinds(codes, ndims, sizes)
    digests = _verified(files, file, start, nbytes, kinds, names)
    if flat.any():  # a range of elements is a box of a chunk of one dimension
        sizes, within, lengths = sizes.copy(), within.copy(), lengths.copy()
        sizes[flat, 0] = (nbytes // itemsize)[flat]
        sizes[flat, 1:], within[flat, 1:], lengths[flat, 1:] = 1, 0, 1
    places = zip(names, file.tolist(), start.tolist(), nbytes.tolist(), strict=True)
    boxes = zip(dims.tolist(), sizes.tolist(), within.tolist(), lengths.tolist(), strict=True)
    sources = zip(digests, _run_begins(sizes, within, lengths, itemsize).tolist(), strict=True)
    targets = zip(taken, plan.dest_within[rows].tolist(), strict=True)
    return [
        Wanted(
            name=name,
            file=number,
            start=begin,
            nbytes=size,
            sizes=tuple(chunk[:ndim]),
            within=tuple(inside[:ndim]),
            lengths=tuple(box[:ndim]),
            tensor=box_of(tensor.detach(), at, box),
            digests=known,
            run=run,
        )
        for (name, number, begin, size), (ndim, chunk, inside, box), (known, run), (tensor, at) in (
            zip(places, boxes, sources, targets, strict=True)
        )
    ]


def _run_begins(sizes: I64, within: I64, lengths: I64, itemsizes: I64) -> I64:
    """(n,) where boxes begin in their chunks, in bytes; -1 for those that are not one run there.

    Args:
        sizes: (n, D) of the chunks.
        within, lengths: (n, D) the boxes in them.
    """
    first, last = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    for size, begin, length in zip(sizes.T, within.T, lengths.T, strict=True):
        first = first * size + begin
        last = last * size + begin + length - 1
    elements = row_products(lengths)
    is_run = (last - first + 1 == elements) & (elements > 0)
    return np.where(is_run, first * itemsizes, -1)


def _codes_of(
    tensors: Sequence[torch.Tensor],
    names: Sequence[str],
    dims: I64,
    ndims: I64,
    itemsizes: I64,
    *,
    checkpoint: str,
) -> I64:
    """Codes of the dtypes of ``tensors``, which have ``dims`` dimensions and ``itemsizes``.

    Raises ``StateMismatchError`` for one that has others; ``ndims`` are stored.
    """
    dtypes = [tensor.dtype for tensor in tensors]
    sizes = {dtype: dtype.itemsize for dtype in set(dtypes)}
    fits = np.fromiter(map(sizes.__getitem__, dtypes), np.int64, len(dtypes)) == itemsizes
    fits &= np.array([tensor.ndim for tensor in tensors], np.int64) == dims
    if not fits.all():
        at = int(np.argmin(fits))
        raise StateMismatchError(
            f"{itemsizes[at]} bytes an element in {ndims[at]} dimensions are stored, the "
            f"destination is {dtypes[at]} of shape {tuple(tensors[at].shape)}",
            kind="dtype_mismatch",
            checkpoint=checkpoint,
            tensor=names[at],
        )
    codes = {dtype: code_of(dtype) for dtype in sizes}
    return np.fromiter(map(codes.__getitem__, dtypes), np.int64, len(dtypes))


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
        if not len(within) == len(lengths) == len(sizes) or any(
            begin < 0 or length < 0 or begin + length > size
            for begin, length, size in zip(within, lengths, sizes, strict=True)
        ):
            raise InvalidPlanError(
                f"the box at {within} of {lengths} leaves the chunk of {sizes}",
                kind="plan_overlap",
                checkpoint=checkpoint,
                tensor=stored.name,
            )
        runs = box_runs(sizes, within, lengths, want.tensor.element_size())
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
                run=runs.first if runs.count == 1 else -1,
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
    digests = _verified(
        files,
        np.array([row.file for row in wanted], np.int64),
        np.array([row.start for row in wanted], np.int64),
        np.array([row.nbytes for row in wanted], np.int64),
        (list(stored), kinds),
        [row.name for row in wanted],
    )
    if not files.verify_digests:
        return list(wanted)
    return [row._replace(digests=blocks) for row, blocks in zip(wanted, digests, strict=True)]


def _verified(
    files: CheckpointFiles,
    file: I64,
    start: I64,
    nbytes: I64,
    kinds: tuple[list[Stored], I64],
    names: Sequence[str],
) -> Sequence[U64 | None]:
    """(n,) the digests of chunks, each found to be what its file's header says it is; None where
    they are not to be checked.

    Args:
        file, start, nbytes: (n,) the chunks, sorted by file.
        kinds: dtypes and shapes as headers list them, and (n,) which of them a chunk is.
        names: (n,) for messages.
    """
    stored, kind = kinds
    for begin, end in stretches(file):
        files.compare_entries(
            int(file[begin]),
            start[begin:end],
            nbytes[begin:end],
            stored,
            kind[begin:end],
            names[begin:end],
        )
    if not files.verify_digests:
        return [None] * len(file)
    found: list[U64 | None] = [None] * len(file)
    for part in digest_rows(files, file, start, nbytes, names):
        table = part.table
        begins, ends = table.first_block[part.at].tolist(), table.first_block[part.at + 1].tolist()
        for at, first, last in zip(part.rows.tolist(), begins, ends, strict=True):
            found[at] = table.blocks[first:last]
    return found
