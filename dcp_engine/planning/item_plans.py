"""Plans over all ranks as lists of items: dedup, metadata, validation.

The way of planners that are not the engine's own or override a method; the engine itself plans
in columns (``global_plan``). Time is Python's per item, but nowhere worse than ``n log n``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dcp_engine.errors import InvalidPlanError
from dcp_engine.geometry.tiling import find_tiling_faults
from dcp_engine.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from dcp_engine.plan import SavePlan, WriteItem, WriteItemType
from dcp_engine.planning.divergence import format_ranks
from dcp_engine.planning.items import own_save_plan, stored_nbytes

__all__ = ["dedup_items", "merge_items", "validate_items"]


def dedup_items(plans: Sequence[Any], *, to_lowest_rank: bool = False) -> list[SavePlan]:
    """Leave each item on one of the ranks that offer it.

    What one rank offers stays there; of the rest, the largest first, each goes to the rank with
    the fewest bytes among those that offer it, or with ``to_lowest_rank`` to the lowest. Order
    within a plan is kept.

    Raises ``InvalidPlanError(kind="plan_divergence")`` if ranks describe one item differently.
    """
    own = [own_save_plan(plan) for plan in plans]
    holders: dict[MetadataIndex, list[int]] = {}
    items: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(own):
        for item in plan.items:
            known = items.setdefault(item.index, item)
            ranks = holders.setdefault(item.index, [])
            if known is not item:
                _check_same(known, item, ranks, rank)
            if not ranks or ranks[-1] != rank:
                ranks.append(rank)
    loads = [0] * len(own)
    writer: dict[MetadataIndex, int] = {}
    shared: list[tuple[int, int, MetadataIndex]] = []
    for position, (index, ranks) in enumerate(holders.items()):
        # Bytes of unknown size count 1, so that they are spread too.
        nbytes = stored_nbytes(items[index]) or 1
        if len(ranks) == 1 or to_lowest_rank:
            writer[index] = ranks[0]
            loads[ranks[0]] += nbytes
        else:
            shared.append((-nbytes, position, index))
    for negative, _, index in sorted(shared, key=lambda entry: entry[:2]):
        chosen = min(holders[index], key=lambda rank: (loads[rank], rank))
        writer[index] = chosen
        loads[chosen] -= negative
    return [
        replace(plan, items=_once([item for item in plan.items if writer[item.index] == rank]))
        for rank, plan in enumerate(own)
    ]


def _once(items: Iterable[WriteItem]) -> list[WriteItem]:
    return list({item.index: item for item in items}.values())


def merge_items(
    plans: Sequence[Any], *, rewrite_index_hints: bool = True
) -> tuple[list[SavePlan], Metadata]:
    """The metadata of all ranks' items, and the plans with each chunk's position in it as hint.

    Raises ``InvalidPlanError``: one name as a tensor and as bytes, with two shapes or dtypes, or
    written twice (``plan_divergence``, ``plan_overlap``).
    """
    entries: dict[str, STORAGE_TYPES] = {}
    first_rank: dict[str, int] = {}
    merged: list[SavePlan] = []
    for rank, plan in enumerate(own_save_plan(p) for p in plans):
        items: list[WriteItem] = []
        for item in plan.items:
            fqn, data = item.index.fqn, item.tensor_data
            known = entries.get(fqn)
            first = first_rank.setdefault(fqn, rank)
            if known is not None and (data is None) != isinstance(known, BytesStorageMetadata):
                raise InvalidPlanError(
                    f"{'a tensor' if data is None else 'an object'} on rank {first}, and "
                    f"{'an object' if data is None else 'a tensor'} on rank {rank}",
                    tensor=fqn,
                    hint="save one value everywhere, or use different keys",
                )
            if known is not None and item.type is not WriteItemType.SHARD:
                raise InvalidPlanError(
                    f"a whole value is written by rank {first} and by rank {rank}",
                    kind="plan_overlap",
                    tensor=fqn,
                    hint="the global plan must leave each value on one rank",
                )
            if data is None:
                entries[fqn] = BytesStorageMetadata()
                items.append(item)
                continue
            if not isinstance(known, TensorStorageMetadata):
                known = entries[fqn] = TensorStorageMetadata(
                    properties=data.properties, size=data.size, chunks=[]
                )
            before = (tuple(known.size), known.properties.dtype)
            if before != (tuple(data.size), data.properties.dtype):
                raise InvalidPlanError(
                    f"ranks disagree about the tensor: {before[1]} {list(before[0])} on rank "
                    f"{first}; {data.properties.dtype} {list(data.size)} on rank {rank}",
                    tensor=fqn,
                    hint="save one value everywhere, or use different keys",
                )
            if rewrite_index_hints:
                hint = MetadataIndex(fqn, item.index.offset, len(known.chunks))
                item = replace(item, index=hint)
            items.append(item)
            known.chunks.append(data.chunk)
        merged.append(replace(plan, items=items))
    return merged, Metadata(entries)


def validate_items(metadata: Metadata) -> None:
    """Check that the chunks of every tensor tile it.

    Raises ``InvalidPlanError`` (``plan_gap``, ``plan_overlap``) naming tensor and box.
    """
    tensors = {
        fqn: entry
        for fqn, entry in metadata.state_dict_metadata.items()
        if not isinstance(entry, BytesStorageMetadata)
    }
    names = list(tensors)
    width = max([1, *(len(entry.size) for entry in tensors.values())])
    shapes = np.ones((len(names), width), np.int64)
    rows: list[int] = []
    boxes: list[tuple[list[int], list[int]]] = []
    for row, (fqn, entry) in enumerate(tensors.items()):
        ndim = len(entry.size)
        shapes[row, :ndim] = entry.size
        for chunk in entry.chunks:
            if len(chunk.offsets) != ndim or len(chunk.sizes) != ndim:
                raise InvalidPlanError(
                    f"a chunk at {list(chunk.offsets)} of sizes {list(chunk.sizes)} in a tensor "
                    f"of shape {list(entry.size)}",
                    kind="plan_overlap",
                    tensor=fqn,
                )
            pad = width - ndim
            rows.append(row)
            boxes.append(([*chunk.offsets, *[0] * pad], [*chunk.sizes, *[1] * pad]))
    corners = np.array(boxes, np.int64).reshape(len(rows), 2, width)
    faults = find_tiling_faults(
        shapes, np.array(rows, np.int64), corners[:, 0].copy(), corners[:, 1].copy()
    )
    if not faults:
        return
    fault, told = faults[0], len(faults) - 1
    fqn = names[fault.tensor]
    ndim = len(tensors[fqn].size)
    at, shape = list(fault.point[:ndim]), list(tensors[fqn].size)
    what = {
        "gap": f"element {at} of shape {shape} is not covered by any rank's items",
        "overlap": f"element {at} of shape {shape} lies in several items",
        "outside": f"the item at {at} lies outside the shape {shape}",
    }[fault.kind]
    raise InvalidPlanError(
        what + (f"; {told} more tensors are not tiled either" if told else ""),
        kind="plan_gap" if fault.kind == "gap" else "plan_overlap",
        tensor=fqn,
        hint="every part of a tensor must be written exactly once, by all ranks together",
    )


def _check_same(known: WriteItem, item: WriteItem, ranks: list[int], rank: int) -> None:
    one, two = known.tensor_data, item.tensor_data
    if one is None and two is None:
        return
    if one is None or two is None:
        raise InvalidPlanError(
            f"a tensor on some ranks and an object on others ({format_ranks(ranks)} and "
            f"{format_ranks([rank])})",
            tensor=item.index.fqn,
        )
    same = (
        tuple(one.size) == tuple(two.size)
        and one.properties.dtype == two.properties.dtype
        and tuple(one.chunk.offsets) == tuple(two.chunk.offsets)
        and tuple(one.chunk.sizes) == tuple(two.chunk.sizes)
    )
    if not same:
        raise InvalidPlanError(
            f"ranks disagree about the tensor: {one.properties.dtype} {list(one.size)} (box "
            f"{list(one.chunk.sizes)}) on {format_ranks(ranks)}; {two.properties.dtype} "
            f"{list(two.size)} (box {list(two.chunk.sizes)}) on {format_ranks([rank])}",
            tensor=item.index.fqn,
            hint="save one value everywhere, or use different keys",
        )
