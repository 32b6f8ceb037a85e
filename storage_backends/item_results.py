"""DCP's metadata and write results as columns: the item face of the writer, on the coordinator.

Belongs here: pure functions from what ``finish`` is given to what ``commit`` takes. Does not
belong here: writing (``item_writes``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import msgspec
import numpy as np

from dcp_engine.errors import InvalidPlanError, UnsupportedStateError
from dcp_engine.format.dtypes import code_of
from dcp_engine.format.nesting import encode_nesting
from dcp_engine.format.object_codec import encode_object
from dcp_engine.metadata import Metadata
from dcp_engine.native_storage import RankReport
from dcp_engine.planning.columns import (
    NO_ALIAS,
    NO_OWNER,
    GlobalPlan,
    ObjectTable,
    PlacedChunks,
    PlannedFiles,
    TensorTable,
)
from dcp_engine.state.values import EntryKind
from dcp_engine.storage import WriteResult
from storage_backends.item_writes import ItemPlace, StoredItem

__all__ = ["PLANNER_DATA_NAME", "columns_of_results", "encoded_planner_data", "is_path_mapping"]

logger = logging.getLogger(__name__)

PLANNER_DATA_NAME = "extra/dcp_engine/planner_data"
"""The extra file that keeps the ``planner_data`` of planners other than the default one."""

Offsets = tuple[int, ...]


def columns_of_results(
    metadata: Metadata,
    results: Sequence[Sequence[WriteResult]],
    *,
    ranks: Sequence[int],
    world_size: int,
) -> tuple[GlobalPlan, list[RankReport]]:
    """The global plan that ``results`` carried out, and every rank's report.

    ``results[i]`` are those of ``ranks[i]``. Raises ``InvalidPlanError`` if a chunk or an object
    of ``metadata`` was not written, or written twice.
    """
    reports: dict[int, RankReport] = {}
    chunks: dict[tuple[str, Offsets], tuple[int, ItemPlace]] = {}
    objects: dict[str, int] = {}
    for rank, of_rank in zip(ranks, results, strict=True):
        reports[rank] = _nothing(rank)
        for result in of_rank:
            stored = result.storage_data
            if not isinstance(stored, StoredItem):
                _mismatch("a write result is not one of this writer", result.index.fqn, rank)
            if of_rank[0] is result:
                reports[rank] = msgspec.msgpack.decode(stored.report, type=RankReport)
            _take(result, stored.place, rank, metadata, chunks, objects)
    files = sorted((rank, file.number) for rank, r in reports.items() for file in r.files)
    rows, placed = _tensor_rows(metadata, chunks)
    return (
        GlobalPlan(
            world_size=world_size,
            tensors=_tensor_table(rows),
            aliases=np.full(len(rows), NO_ALIAS, np.int32),
            chunks=_placed_chunks(rows, placed, {key: row for row, key in enumerate(files)}),
            files=_planned_files(files, placed),
            objects=_object_table(metadata, objects),
            containers=_nesting(metadata.planner_data),
        ),
        list(reports.values()),
    )


def _nothing(rank: int) -> RankReport:
    """The report of a rank that had no items, and so wrote nothing."""
    return RankReport(rank=rank, files=[], chunks=0, digests_size=0, digests_xxh3="", objects=[])


def _take(
    result: WriteResult,
    place: ItemPlace,
    rank: int,
    metadata: Metadata,
    chunks: dict[tuple[str, Offsets], tuple[int, ItemPlace]],
    objects: dict[str, int],
) -> None:
    name = result.index.fqn
    entry = metadata.state_dict_metadata.get(name)
    if entry is None:
        _mismatch("something was written that the metadata does not name", name, rank)
    if not _is_tensor(entry):
        if name in objects:
            _mismatch(f"ranks {objects[name]} and {rank} both wrote it", name, rank)
        objects[name] = rank
    elif place.nbytes:
        key = (name, tuple(result.index.offset or (0,) * len(_entry(entry).size)))
        if key in chunks:
            _mismatch(f"ranks {chunks[key][0]} and {rank} both wrote it", name, rank)
        chunks[key] = (rank, place)


def _is_tensor(entry: object) -> bool:
    return hasattr(entry, "chunks")


def _entry(entry: Any) -> Any:
    return entry


_Row = tuple[str, int, tuple[int, ...], int]
"""Name, dtype code, global shape, bytes per element."""
_Placed = tuple[int, Offsets, tuple[int, ...], int, ItemPlace]
"""Row, offsets, sizes, rank, place."""


def _tensor_rows(
    metadata: Metadata, chunks: Mapping[tuple[str, Offsets], tuple[int, ItemPlace]]
) -> tuple[list[_Row], list[_Placed]]:
    rows: list[_Row] = []
    placed: list[_Placed] = []
    for name, entry in metadata.state_dict_metadata.items():
        if not _is_tensor(entry):
            continue
        tensor = _entry(entry)
        dtype = tensor.properties.dtype
        row = len(rows)
        rows.append((name, code_of(dtype), tuple(tensor.size), dtype.itemsize))
        for chunk in tensor.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            nbytes = int(np.prod(sizes, dtype=np.int64)) * dtype.itemsize
            if not nbytes:
                continue
            found = chunks.get((name, offsets))
            if found is None:
                _mismatch(f"the chunk at {offsets} was planned and not written", name)
            rank, place = found
            if place.nbytes != nbytes:
                _mismatch(f"{place.nbytes} bytes were written, planned are {nbytes}", name, rank)
            placed.append((row, offsets, sizes, rank, place))
    if len(placed) != len(chunks):
        known = {(rows[row][0], offsets) for row, offsets, *_ in placed}
        name, offsets = min(chunks.keys() - known)
        _mismatch(f"the chunk at {offsets} was written and is not in the metadata", name)
    placed.sort(key=lambda entry: entry[:2])
    return rows, placed


def _tensor_table(rows: Sequence[_Row]) -> TensorTable:
    width = max([1, *(len(shape) for _, _, shape, _ in rows)])
    return TensorTable(
        names=tuple(name for name, *_ in rows),
        kinds=np.full(len(rows), EntryKind.SHARDED, np.uint8),
        dtypes=np.array([code for _, code, _, _ in rows], np.uint8),
        ndims=np.array([len(shape) for _, _, shape, _ in rows], np.uint8),
        shapes=_padded([shape for _, _, shape, _ in rows], width, 1),
        owners=np.full(len(rows), NO_OWNER, np.int32),
    )


def _placed_chunks(
    rows: Sequence[_Row], placed: Sequence[_Placed], file_rows: Mapping[tuple[int, int], int]
) -> PlacedChunks:
    width = max([1, *(len(shape) for _, _, shape, _ in rows)])
    return PlacedChunks(
        tensor=np.array([row for row, *_ in placed], np.int32),
        offsets=_padded([offsets for _, offsets, *_ in placed], width, 0),
        sizes=_padded([sizes for _, _, sizes, _, _ in placed], width, 1),
        file=np.array([file_rows[rank, place.number] for *_, rank, place in placed], np.int32),
        start=np.array([place.start for *_, place in placed], np.int64),
        nbytes=np.array([place.nbytes for *_, place in placed], np.int64),
    )


def _planned_files(files: Sequence[tuple[int, int]], placed: Sequence[_Placed]) -> PlannedFiles:
    totals = dict.fromkeys(files, 0)
    counts = dict.fromkeys(files, 0)
    for *_, rank, place in placed:
        totals[rank, place.number] += place.nbytes
        counts[rank, place.number] += 1
    return PlannedFiles(
        rank=np.array([rank for rank, _ in files], np.int32),
        number=np.array([number for _, number in files], np.int32),
        data_bytes=np.array([totals[key] for key in files], np.int64),
        chunks=np.array([counts[key] for key in files], np.int64),
    )


def _padded(rows: Sequence[tuple[int, ...]], width: int, fill: int) -> Any:
    padded = np.full((len(rows), width), fill, np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return padded


def _object_table(metadata: Metadata, objects: Mapping[str, int]) -> ObjectTable:
    names = [n for n, entry in metadata.state_dict_metadata.items() if not _is_tensor(entry)]
    for name in names:
        if name not in objects:
            _mismatch("an object was planned and not written", name)
    return ObjectTable(
        names=tuple(names),
        kinds=np.full(len(names), EntryKind.REPLICATED, np.uint8),
        owners=np.array([objects[name] for name in names], np.int32),
    )


def is_path_mapping(planner_data: object) -> bool:
    """Whether it is the default planner's: name to path."""
    return isinstance(planner_data, Mapping) and all(
        isinstance(name, str)
        and isinstance(path, tuple)
        and path
        and all(type(key) in (str, int) for key in path)
        for name, path in planner_data.items()
    )


def _nesting(planner_data: Any) -> bytes:
    return encode_nesting(dict(planner_data) if is_path_mapping(planner_data) else {}, {})


def encoded_planner_data(planner_data: object) -> bytes | None:
    """The content of the extra file that keeps another planner's own data; None if there is
    none, or if it would take a pickle to keep it, which opening a checkpoint must not execute."""
    if planner_data is None or is_path_mapping(planner_data):
        return None
    try:
        encoded = encode_object(planner_data, fqn="planner_data")
    except UnsupportedStateError:
        encoded = None
    if encoded is None or encoded.pickled:
        logger.warning(
            "planner_data (%s) is not stored: it has no encoding but pickle",
            type(planner_data).__name__,
        )
        return None
    return encoded.data


def _mismatch(message: str, tensor: str, rank: int | None = None) -> NoReturn:
    raise InvalidPlanError(
        f"what was written is not what was planned: {message}",
        kind="results_mismatch",
        tensor=tensor,
        rank=rank,
        hint="nothing was committed; planner and writer must agree on every item",
    )
