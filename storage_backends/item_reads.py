"""DCP's read items as wanted boxes: the item face of the reader.

Belongs here: looking items up in a manifest, and handing results to the planner. Does not belong
here: reading (``read_files``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dcp_engine.errors import InvalidPlanError, StateMismatchError
from dcp_engine.format.manifest import Manifest, StoredObject, StoredTensor
from dcp_engine.format.object_codec import EncodedObject
from dcp_engine.plan import LoadItemType, ReadItem
from dcp_engine.planner import LoadPlanner
from dcp_engine.planning.item_bytes import to_item_bytes

__all__ = ["ReadingRank", "WantedItem", "load_objects", "want_items"]


@dataclass(frozen=True, kw_only=True)
class ReadingRank:
    """Who reads, as far as the reader was told. Only ``PerRank`` values need it."""

    rank: int | None = None
    world_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class WantedItem:
    """A box of a stored chunk for one item."""

    item: ReadItem
    stored: StoredTensor
    chunk: int
    """Row of the tensor's chunks."""
    tensor: torch.Tensor
    """What the planner gave for it."""


_BYTES = LoadItemType.BYTE_IO.name
"""Types are compared by name, as when writing."""


def want_items(
    items: Sequence[ReadItem],
    manifest: Manifest,
    planner: LoadPlanner,
    *,
    place: ReadingRank,
    checkpoint: str,
) -> list[WantedItem]:
    """The tensor items of a plan, each with its chunk and its destination."""
    rows: dict[str, Mapping[tuple[int, ...], int]] = {}
    wanted: list[WantedItem] = []
    for item in items:
        if item.type.name == _BYTES:
            continue
        name = item.storage_index.fqn
        stored = _tensor(manifest, name, place, checkpoint)
        if name not in rows:
            rows[name] = {
                tuple(offsets): row for row, offsets in enumerate(stored.chunks.offsets.tolist())
            }
        tensor = planner.resolve_tensor(item)
        lengths = tuple(item.lengths)
        if tuple(tensor.shape) != lengths:
            raise InvalidPlanError(
                f"resolve_tensor returned shape {tuple(tensor.shape)} for a box of {lengths}",
                kind="results_mismatch",
                checkpoint=checkpoint,
                tensor=name,
            )
        if not tensor.numel():
            planner.commit_tensor(item, tensor)
            continue
        offset = tuple(item.storage_index.offset or (0,) * len(stored.shape))
        row = rows[name].get(offset)
        if row is None:
            raise InvalidPlanError(
                f"no chunk of it begins at {offset}",
                kind="results_mismatch",
                checkpoint=checkpoint,
                tensor=name,
                hint="plan the load by the metadata of this very checkpoint",
            )
        wanted.append(WantedItem(item=item, stored=stored, chunk=row, tensor=tensor))
    return wanted


def _tensor(manifest: Manifest, name: str, place: ReadingRank, checkpoint: str) -> StoredTensor:
    found = manifest.tensors.get(name)
    if found is None and name in manifest.per_rank_tensors:
        rank = _own_rank(manifest, name, place, checkpoint)
        found = manifest.per_rank_tensors[name].get(rank)
    if found is None:
        raise _missing(name, "tensor", checkpoint)
    return found


def _object(manifest: Manifest, name: str, place: ReadingRank, checkpoint: str) -> StoredObject:
    found = manifest.objects.get(name)
    if found is None and name in manifest.per_rank_objects:
        rank = _own_rank(manifest, name, place, checkpoint)
        found = manifest.per_rank_objects[name].get(rank)
    if found is None:
        raise _missing(name, "object", checkpoint)
    return found


def _own_rank(manifest: Manifest, name: str, place: ReadingRank, checkpoint: str) -> int:
    """Whose value of several the reading rank gets: its own, of as many ranks as saved."""
    if place.rank is not None and place.world_size in (None, manifest.world_size):
        return place.rank
    raise StateMismatchError(
        f"the value is one of each rank's own, saved by {manifest.world_size} ranks, and "
        + (
            f"{place.world_size} ranks read it"
            if place.rank is not None
            else "the reader was not told which rank reads it"
        ),
        kind="world_size_mismatch",
        checkpoint=checkpoint,
        tensor=name,
        hint="load it with the default planner and the engine's own reader, and per_rank=",
    )


def _missing(name: str, what: str, checkpoint: str) -> StateMismatchError:
    return StateMismatchError(
        f"the checkpoint does not hold a {what} of this name",
        kind="missing_key",
        checkpoint=checkpoint,
        tensor=name,
    )


def load_objects(
    items: Sequence[ReadItem],
    manifest: Manifest,
    planner: LoadPlanner,
    fetch: Callable[[StoredObject], bytes],
    *,
    place: ReadingRank,
    checkpoint: str,
) -> None:
    """Hand the planner the bytes of its byte items."""
    for item in items:
        if item.type.name == _BYTES:
            stored = _object(manifest, item.storage_index.fqn, place, checkpoint)
            encoded = EncodedObject(fetch(stored), pickled=stored.pickled)
            planner.load_bytes(item, to_item_bytes(encoded, fqn=stored.name))
