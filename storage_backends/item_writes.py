"""DCP's write items as files: the item face of the writer, on each rank.

Belongs here: what a plan carries to its rank, laying out items, and their results. Does not
belong here: the coordinator's end of it (``item_results``).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch

from dcp_engine.coordination.interface import RunIdentity
from dcp_engine.errors import InvalidPlanError
from dcp_engine.format.dtypes import code_of
from dcp_engine.format.object_codec import EncodedObject
from dcp_engine.format.shard_file import entry_size_bound, split_by_header_limit
from dcp_engine.native_storage import RankReport, SaveTicket
from dcp_engine.plan import SavePlan, WriteItem, WriteItemType
from dcp_engine.planner import SavePlanner
from dcp_engine.planning.item_bytes import from_item_bytes
from dcp_engine.planning.layout import alignment_classes
from dcp_engine.storage import WriteResult
from storage_backends.layout import FileLayout, RankLayout, place_objects

__all__ = [
    "ItemPlace",
    "ItemTicket",
    "StoredItem",
    "lay_out_items",
    "ticket_plans",
    "write_results",
]


@dataclass(frozen=True, kw_only=True)
class ItemTicket:
    """In ``SavePlan.storage_data``: what a rank must know of the save."""

    save_id: str
    rank: int
    world_size: int
    coordinator_rank: int

    def ticket(self, identity: RunIdentity) -> SaveTicket:
        """As the column face knows it."""
        return SaveTicket(
            save_id=self.save_id,
            rank=self.rank,
            world_size=self.world_size,
            coordinator_rank=self.coordinator_rank,
            identity=identity,
        )


@dataclass(frozen=True)
class ItemPlace:
    """Where an item's bytes are; ``number`` is -1 for what needs no bytes in a data file."""

    number: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class StoredItem:
    """In ``WriteResult.storage_data``. All results of a rank share one ``report``, encoded by
    msgpack; pickle keeps it once."""

    place: ItemPlace
    report: bytes


def ticket_plans(plans: Sequence[SavePlan], ticket: SaveTicket) -> list[SavePlan]:
    """``plans``, each with its rank's ``ItemTicket``."""
    alone = not ticket.use_collectives
    return [
        replace(
            plan,
            storage_data=ItemTicket(
                save_id=ticket.save_id,
                rank=ticket.rank if alone else rank,
                world_size=ticket.world_size,
                coordinator_rank=ticket.coordinator_rank,
            ),
        )
        for rank, plan in enumerate(plans)
    ]


def lay_out_items(
    items: Sequence[WriteItem], planner: SavePlanner
) -> tuple[RankLayout, list[ItemPlace]]:
    """The files for ``items``, and the place of each.

    Tensors lie as ``planning.layout`` has them, for alignment, and are resolved when they are
    written; bytes are resolved at once, because nobody knows their sizes before.
    """
    tensors = [row for row, item in enumerate(items) if item.type.name != _BYTES]
    sizes = {row: _nbytes(items[row]) for row in tensors}
    stored = [row for row in tensors if sizes[row]]
    classes = alignment_classes(np.array([sizes[row] for row in stored], np.int64))
    stored = [stored[at] for at in np.argsort(classes, kind="stable").tolist()]
    bounds = [entry_size_bound(items[row].index.fqn, len(_sizes(items[row]))) for row in stored]
    numbers = split_by_header_limit(np.array(bounds, np.int64)).tolist()
    files = [FileLayout(number=number) for number in range(max(numbers, default=-1) + 1)]
    ends = [0] * len(files)
    places = [ItemPlace(-1, 0, 0)] * len(items)
    for row, number in zip(stored, numbers, strict=True):
        places[row] = ItemPlace(number, ends[number], sizes[row])
        ends[number] += sizes[row]
        _add(files[number], items[row], planner, sizes[row])
    objects = [row for row, item in enumerate(items) if item.type.name == _BYTES]
    encoded = [(items[row].index.fqn, _encoded(items[row], planner), True) for row in objects]
    layout = place_objects(files, encoded)
    for row, report in zip(objects, layout.objects, strict=True):
        number = -1 if report.inline is not None else report.number
        places[row] = ItemPlace(number, report.start, report.nbytes)
    return layout, places


_BYTES = WriteItemType.BYTE_IO.name
"""Types are compared by name: torch's own tensor classes hand over items of torch's enum."""


def _data(item: WriteItem) -> Any:
    if item.tensor_data is None:
        raise InvalidPlanError(
            "the write item of a tensor has no tensor_data",
            kind="results_mismatch",
            tensor=item.index.fqn,
        )
    return item.tensor_data


def _sizes(item: WriteItem) -> tuple[int, ...]:
    return tuple(_data(item).chunk.sizes)


def _dtype(item: WriteItem) -> torch.dtype:
    dtype: torch.dtype = _data(item).properties.dtype
    return dtype


def _nbytes(item: WriteItem) -> int:
    return int(np.prod(_sizes(item), dtype=np.int64)) * _dtype(item).itemsize


def _add(file: FileLayout, item: WriteItem, planner: SavePlanner, nbytes: int) -> None:
    data = _data(item)
    shape = _sizes(item)
    is_whole = shape == tuple(data.size)
    offsets = None if is_whole else tuple(data.chunk.offsets)
    code = code_of(_dtype(item))
    file.add(item.index.fqn, offsets, code, shape, nbytes, _resolver(item, planner))


def _resolver(item: WriteItem, planner: SavePlanner) -> Callable[[], torch.Tensor]:
    def resolve() -> torch.Tensor:
        tensor = planner.resolve_data(item)
        if not isinstance(tensor, torch.Tensor):
            raise _unexpected(item, f"a {type(tensor).__name__}")
        if tuple(tensor.shape) != _sizes(item) or tensor.dtype != _dtype(item):
            raise _unexpected(item, f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}")
        return tensor.detach()

    return resolve


def _encoded(item: WriteItem, planner: SavePlanner) -> EncodedObject:
    value = planner.resolve_data(item)
    if not isinstance(value, io.BytesIO):
        raise _unexpected(item, f"a {type(value).__name__}")
    return from_item_bytes(value.getvalue())


def _unexpected(item: WriteItem, what: str) -> InvalidPlanError:
    planned = (
        "bytes" if item.type.name == _BYTES else f"a {_dtype(item)} tensor of shape {_sizes(item)}"
    )
    return InvalidPlanError(
        f"resolve_data returned {what}, and {planned} was planned",
        kind="results_mismatch",
        tensor=item.index.fqn,
        hint="let the planner change tensor_data in create_local_plan as it changes the data",
    )


def write_results(
    items: Sequence[WriteItem], places: Sequence[ItemPlace], report: RankReport
) -> list[WriteResult]:
    """One result per item."""
    encoded = msgspec.msgpack.encode(report)
    return [
        WriteResult(
            index=item.index,
            size_in_bytes=place.nbytes,
            storage_data=StoredItem(place, encoded),
        )
        for item, place in zip(items, places, strict=True)
    ]
