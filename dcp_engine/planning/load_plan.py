"""What one rank reads: wanted boxes against stored chunks.

Belongs here: matching a destination with a manifest, and the refusals when they do not fit. Does
not belong here: bytes and ranges (``geometry.runs``, the reader), and objects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.errors import DamagedCheckpointError, StateMismatchError
from dcp_engine.format.dtypes import code_of, info, is_known
from dcp_engine.format.lazy_maps import TensorMap
from dcp_engine.format.manifest import Manifest, StoredTensor
from dcp_engine.format.tensor_section import WholeTensors
from dcp_engine.geometry.boxes import find_overlaps
from dcp_engine.planning.arrays import all_rows, pad_columns, padded_rows, row_products
from dcp_engine.planning.columns import I32, I64, LoadColumns
from dcp_engine.state.values import Box, TensorValue

__all__ = ["LoadSource", "PerRankPolicy", "make_load_columns", "plan_boxes", "unexpected_keys"]

PerRankPolicy = Literal["error", "skip", "list"]

_FEW_PAIRS = 16
"""Up to so many pairs of a wanted and a stored box Python is done before numpy has begun."""
_FEW_BOXES = 8
"""Up to so many wanted boxes of a tensor are compared with all its chunks one by one, which is
faster than any index."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadSource:
    """What one rank reads into which tensors."""

    columns: LoadColumns
    tensors: tuple[torch.Tensor, ...]
    """The destinations that ``columns.dest`` refers to."""
    lists: tuple[tuple[str, tuple[torch.Tensor, ...]], ...]
    """With ``per_rank="list"`` at another world size: name, and every saving rank's tensor (new,
    on the CPU, to be put in place of the value), by rank."""
    missing: tuple[str, ...]
    """Wanted tensors that are not stored (``strict=False``), in order."""
    skipped: tuple[str, ...]
    """Per-rank tensors of another world size that stay as they are."""


def make_load_columns(
    wanted: Sequence[TensorValue],
    manifest: Manifest,
    *,
    rank: int,
    world_size: int,
    strict: bool = True,
    per_rank: PerRankPolicy = "error",
    agreeing: Collection[str] = (),
) -> LoadSource:
    """Plan one rank's load.

    Args:
        wanted: the destinations.
        strict: whether a wanted tensor that is not stored is an error; else it is reported.
        per_rank: what becomes of per-rank values that another number of ranks saved.
        agreeing: names of those that are the same on all ranks that saved them, which are read
            as if they were replicated.

    Raises ``StateMismatchError`` of kind ``missing_key``, ``shape_mismatch``, ``dtype_mismatch``,
    ``type_mismatch`` or ``world_size_mismatch``, naming the tensor, and ``DamagedCheckpointError``
    for chunks that do not cover what is wanted.
    """
    parts = _Parts()
    missing: list[str] = []
    skipped: list[str] = []
    lists: list[tuple[str, tuple[torch.Tensor, ...]]] = []
    for value in _add_whole_tensors(wanted, manifest, parts):
        stored = manifest.tensors.get(value.fqn)
        by_rank = manifest.per_rank_tensors.get(value.fqn)
        if stored is None and by_rank is not None:
            if manifest.world_size == world_size:
                stored = by_rank.get(rank)
            elif value.fqn in agreeing:
                stored = by_rank[min(by_rank)]
            else:
                if per_rank == "error":
                    raise _other_world(value, manifest.world_size, world_size)
                if per_rank == "skip":
                    skipped.append(value.fqn)
                    continue
                lists.append((value.fqn, _read_all(by_rank, parts)))
                continue
        if stored is None:
            _refuse_missing(value, manifest, strict, rank)
            missing.append(value.fqn)
            continue
        _check_fit(value, stored)
        parts.add(stored, value.boxes, first=len(parts.destinations))
        parts.destinations.extend(value.tensors)
    return LoadSource(
        columns=parts.columns(),
        tensors=tuple(parts.destinations),
        lists=tuple(lists),
        missing=tuple(missing),
        skipped=tuple(skipped),
    )


def _add_whole_tensors(
    wanted: Sequence[TensorValue], manifest: Manifest, parts: _Parts
) -> Sequence[TensorValue]:
    """Plan what is wanted whole, stored in one chunk, and fits: what there may be a hundred
    thousand of, so without an object for each. Returns the others."""
    if not isinstance(manifest.tensors, TensorMap):
        return wanted
    stored = manifest.tensors.whole([value.fqn for value in wanted])
    # Most are ``wanted`` itself, all of it.
    found = wanted if len(stored.at) == len(wanted) else [wanted[at] for at in stored.at.tolist()]
    shapes = [value.shape for value in found]
    dtypes = [value.dtype for value in found]
    boxes = [value.boxes for value in found]
    codes = {dtype: code_of(dtype) if is_known(dtype) else -1 for dtype in set(dtypes)}
    ndims = np.fromiter(map(len, shapes), np.int64, len(found))
    width = max(stored.shapes.shape[1], int(ndims.max(initial=0)))
    stored_shapes = pad_columns(stored.shapes, width, 1)
    fits = np.fromiter(map(codes.__getitem__, dtypes), np.int64, len(found)) == stored.dtypes
    fits &= (ndims == stored.ndims) & all_rows(padded_rows(shapes, width, 1) == stored_shapes)
    fits &= np.array(
        [len(b) == 1 and b[0].sizes == shape for b, shape in zip(boxes, shapes, strict=True)],
        np.bool_,
    )
    rows = np.flatnonzero(fits)
    if len(rows) == len(wanted):
        parts.add_whole(wanted, stored, rows)
        return ()
    parts.add_whole([found[row] for row in rows.tolist()], stored, rows)
    rest = np.ones(len(wanted), np.bool_)
    rest[stored.at[rows]] = False
    return [wanted[at] for at in np.flatnonzero(rest).tolist()]


def plan_boxes(stored: StoredTensor, boxes: Sequence[Box]) -> LoadColumns:
    """Read ``boxes`` of one stored tensor into as many destinations, in their order."""
    parts = _Parts()
    parts.add(stored, boxes, first=0)
    return parts.columns()


def unexpected_keys(manifest: Manifest, wanted: Collection[str]) -> tuple[str, ...]:
    """What is stored and not among ``wanted``, in the order of the manifest."""
    names = wanted if isinstance(wanted, (set, frozenset, dict)) else set(wanted)
    stored = dict.fromkeys(
        [
            *manifest.tensors,
            *manifest.per_rank_tensors,
            *manifest.objects,
            *manifest.per_rank_objects,
        ]
    )
    return tuple(name for name in stored if name not in names)


class _Parts:
    """Overlaps, collected tensor by tensor."""

    def __init__(self) -> None:
        self.destinations: list[torch.Tensor] = []
        self._names: list[str] = []
        self._ndims: list[int] = []
        self._itemsizes: list[int] = []
        self._counts: list[int] = []
        self._shared: list[bool] = []
        self._file: list[I32] = []
        self._start: list[I64] = []
        self._dest: list[I64] = []
        # chunk_offsets, chunk_sizes, within, lengths, dest_within
        self._boxes: tuple[list[I64], ...] = ([], [], [], [], [])

    def add(self, stored: StoredTensor, boxes: Sequence[Box], *, first: int) -> None:
        """Read ``boxes`` of ``stored`` into the destinations from row ``first`` on."""
        if not boxes:
            return
        chunks = stored.chunks
        ndim = len(stored.shape)
        offsets = np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), ndim)
        sizes = np.array([box.sizes for box in boxes], np.int64).reshape(len(boxes), ndim)
        box, chunk = _overlaps(offsets, sizes, chunks.offsets, chunks.sizes)
        chunk_offsets = chunks.offsets.take(chunk, axis=0)
        chunk_sizes = chunks.sizes.take(chunk, axis=0)
        own = offsets.take(box, axis=0)
        begin = np.maximum(own, chunk_offsets)
        end = np.minimum(own + sizes.take(box, axis=0), chunk_offsets + chunk_sizes)
        lengths = end - begin
        covered = np.bincount(box, weights=row_products(lengths), minlength=len(boxes))
        short = np.flatnonzero(covered != row_products(sizes))
        if len(short):
            lost = boxes[int(short[0])]
            raise DamagedCheckpointError(
                f"the stored chunks do not cover the box at {list(lost.offsets)} of sizes "
                f"{list(lost.sizes)} exactly once",
                tensor=stored.name,
            )
        self._names.append(stored.name)
        self._ndims.append(ndim)
        self._itemsizes.append(stored.info.itemsize)
        self._counts.append(len(box))
        self._shared.append(stored.alias_of is not None or stored.shares_bytes)
        self._file.append(chunks.file.take(chunk))
        self._start.append(chunks.start.take(chunk))
        self._dest.append(box + first)
        for column, values in zip(
            self._boxes,
            (chunk_offsets, chunk_sizes, begin - chunk_offsets, lengths, begin - own),
            strict=True,
        ):
            column.append(values)

    def add_whole(self, values: Sequence[TensorValue], stored: WholeTensors, rows: I64) -> None:
        """Read ``rows`` of ``stored``, each into the one tensor of its value."""
        count, ndims = len(rows), stored.ndims[rows]
        sizes = stored.shapes[rows, : int(ndims.max(initial=1))]
        zeros = np.zeros_like(sizes)
        codes = stored.dtypes[rows].tolist()
        itemsizes = {code: info(code).itemsize for code in set(codes)}
        first = len(self.destinations)
        self.destinations.extend([value.tensors[0] for value in values])
        self._names += [value.fqn for value in values]
        self._ndims += ndims.tolist()
        self._itemsizes += [itemsizes[code] for code in codes]
        self._counts += [1] * count
        self._shared += [False] * count
        self._file.append(stored.file[rows])
        self._start.append(stored.start[rows])
        self._dest.append(np.arange(first, first + count))
        for column, cells in zip(self._boxes, (zeros, sizes, zeros, sizes, zeros), strict=True):
            column.append(cells)

    def columns(self) -> LoadColumns:
        """All of it, by file and position."""
        width = max([1, *self._ndims])
        fills = (0, 1, 0, 1, 0)
        chunk_offsets, chunk_sizes, within, lengths, dest_within = (
            np.concatenate(
                [np.zeros((0, width), np.int64), *(pad_columns(v, width, fill) for v in column)]
            )
            for column, fill in zip(self._boxes, fills, strict=True)
        )
        file = np.concatenate([np.zeros(0, np.int32), *self._file])
        start = np.concatenate([np.zeros(0, np.int64), *self._start])
        itemsize = np.repeat(np.array(self._itemsizes, np.int64), self._counts)
        position = np.zeros(len(file), np.int64)
        for d in range(width):
            position = position * chunk_sizes[:, d] + within[:, d]
        order = np.lexsort((start + position * itemsize, file))
        rows = np.repeat(np.arange(len(self._names), dtype=np.int32), self._counts)
        columns = LoadColumns(
            names=tuple(self._names),
            tensor=rows.take(order),
            ndims=np.repeat(np.array(self._ndims, np.uint8), self._counts).take(order),
            itemsize=itemsize.take(order),
            file=file.take(order),
            chunk_start=start.take(order),
            chunk_offsets=chunk_offsets.take(order, axis=0),
            chunk_sizes=chunk_sizes.take(order, axis=0),
            within=within.take(order, axis=0),
            lengths=lengths.take(order, axis=0),
            dest=np.concatenate([np.zeros(0, np.int64), *self._dest]).take(order).astype(np.int32),
            dest_within=dest_within.take(order, axis=0),
        )
        _refuse_shared_bytes(columns, np.array(self._shared, np.bool_))
        return columns


def _refuse_shared_bytes(columns: LoadColumns, shared: npt.NDArray[np.bool_]) -> None:
    """Raise if two chunks that are read claim the same bytes; ``shared`` tensors may.

    By position of what is read, chunks that do not overlap follow each other whole, so that
    neighbours tell.
    """
    rows = np.flatnonzero(~shared[columns.tensor])
    file, start = columns.file.take(rows), columns.chunk_start.take(rows)
    tensor = columns.tensor.take(rows)
    offsets = columns.chunk_offsets.take(rows, axis=0)
    end = start + row_products(columns.chunk_sizes.take(rows, axis=0)) * columns.itemsize.take(rows)
    same = (
        (tensor[1:] == tensor[:-1])
        & (start[1:] == start[:-1])
        & (offsets[1:] == offsets[:-1]).all(axis=1)
    )
    clash = np.flatnonzero((file[1:] == file[:-1]) & (start[1:] < end[:-1]) & ~same)
    if len(clash):
        first = int(clash[0])
        one, two = columns.names[int(tensor[first])], columns.names[int(tensor[first + 1])]
        raise DamagedCheckpointError(
            f"chunks of {one!r} and {two!r} claim the same bytes", kind="chunks_overlap", tensor=one
        )


def _overlaps(offsets: I64, sizes: I64, stored: I64, stored_sizes: I64) -> tuple[I64, I64]:
    """Pairs (wanted row, stored row) that share an element, by wanted row."""
    if len(offsets) > _FEW_BOXES:
        return find_overlaps(offsets, sizes, stored, stored_sizes)
    if len(offsets) * len(stored) <= _FEW_PAIRS:
        return _few_overlaps(offsets, sizes, stored, stored_sizes)
    ends = stored + stored_sizes
    rows = []
    for begin, size in zip(offsets, sizes, strict=True):
        meets = np.ones(len(stored), np.bool_)
        for d in range(len(begin)):
            low = int(begin[d])
            meets &= (stored[:, d] < low + int(size[d])) & (ends[:, d] > low)
        rows.append(np.flatnonzero(meets))
    counts = [len(row) for row in rows]
    return np.repeat(np.arange(len(rows)), counts), np.concatenate(rows)


def _few_overlaps(offsets: I64, sizes: I64, stored: I64, stored_sizes: I64) -> tuple[I64, I64]:
    chunks = list(zip(stored.tolist(), stored_sizes.tolist(), strict=True))
    pairs = [
        (row, at)
        for row, (begins, extents) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True))
        for at, (others, lengths) in enumerate(chunks)
        if all(
            other < begin + extent and other + length > begin
            for begin, extent, other, length in zip(begins, extents, others, lengths, strict=True)
        )
    ]
    columns = np.array(pairs, np.int64).reshape(len(pairs), 2)
    return columns[:, 0], columns[:, 1]


def _read_all(by_rank: Mapping[int, StoredTensor], parts: _Parts) -> tuple[torch.Tensor, ...]:
    """New tensors for every saving rank's value."""
    tensors = []
    for _, stored in sorted(by_rank.items()):
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        tensors.append(tensor)
        if tensor.numel():
            whole = Box(offsets=(0,) * len(stored.shape), sizes=stored.shape)
            parts.add(stored, (whole,), first=len(parts.destinations))
            parts.destinations.append(tensor)
    return tuple(tensors)


def _refuse_missing(value: TensorValue, manifest: Manifest, strict: bool, rank: int) -> None:
    """An object in its place is an error always, nothing at all only if ``strict``."""
    if value.fqn in manifest.objects or value.fqn in manifest.per_rank_objects:
        raise StateMismatchError(
            "the checkpoint holds an object under this key, the destination is a tensor",
            kind="type_mismatch",
            tensor=value.fqn,
            hint="make the destination what was saved, or leave the key out",
        )
    if strict:
        raise StateMismatchError(
            "the checkpoint does not hold this tensor"
            + (" for this rank" if value.fqn in manifest.per_rank_tensors else ""),
            kind="missing_key",
            tensor=value.fqn,
            rank=rank,
            hint="leave the key out, or load with allow_partial_load=True",
        )


def _check_fit(value: TensorValue, stored: StoredTensor) -> None:
    if tuple(value.shape) != tuple(stored.shape):
        raise StateMismatchError(
            f"the destination has shape {list(value.shape)}, the checkpoint {list(stored.shape)}",
            kind="shape_mismatch",
            tensor=value.fqn,
            hint="build the model as it was saved",
        )
    if value.dtype != stored.dtype:
        raise StateMismatchError(
            f"the destination is {value.dtype}, the checkpoint {stored.dtype}",
            kind="dtype_mismatch",
            tensor=value.fqn,
            hint="load into a tensor of the stored dtype and cast it afterwards",
        )


def _other_world(value: TensorValue, saved: int, now: int) -> StateMismatchError:
    return StateMismatchError(
        f"{saved} ranks saved a value each, and {now} are loading",
        kind="world_size_mismatch",
        tensor=value.fqn,
        hint='load with per_rank="skip" or per_rank="list", or on as many ranks',
    )
