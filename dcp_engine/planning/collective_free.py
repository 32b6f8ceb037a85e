"""Who writes what when ranks do not talk: each knows its own part from the layout alone."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash
from msgspec.structs import replace

from dcp_engine.errors import UsageError
from dcp_engine.planning.global_plan import make_own_plan
from dcp_engine.state.placements import REPLICATE
from dcp_engine.state.values import EntryKind, MeshLayout, TensorValue, Value

__all__ = ["make_own_plan", "own_share"]


def own_share(values: Sequence[Value], *, rank: int) -> list[Value]:
    """The values, or parts of values, that ``rank`` writes.

    Per-rank values and objects are its own (of a shared object that several ranks store, a load
    takes the lowest rank's). Of the ranks that a mesh says hold one box, a hash of the name picks
    the writer, so that the work is spread without a word. Plain tensors are rank 0's. Shards of
    unknown layout are written by whoever holds them. A tensor that is left to another rank stays
    in the list without boxes: a load then notices if that rank did not have it.
    """
    return [value if _is_mine(value, rank) else _without_boxes(value) for value in values]


def _without_boxes(value: Value) -> Value:
    if isinstance(value, TensorValue):
        return replace(value, boxes=(), tensors=())
    return value


def _is_mine(value: Value, rank: int) -> bool:
    if value.kind is EntryKind.PER_RANK or not isinstance(value, TensorValue):
        return True
    if value.layout is not None:
        return bool(value.boxes) and _writes(value.layout, value.fqn, rank)
    return rank == 0 if value.kind is EntryKind.REPLICATED else bool(value.boxes)


def _writes(layout: MeshLayout, fqn: str, rank: int) -> bool:
    """Whether ``rank``'s place along the replicating dimensions is the one that ``fqn`` picks."""
    if rank not in layout.ranks:
        raise UsageError(
            f"rank {rank} holds a part of a tensor whose mesh has ranks {list(layout.ranks)}",
            tensor=fqn,
        )
    position = layout.ranks.index(rank)
    coordinates = []
    for size in reversed(layout.mesh_shape):
        position, coordinate = divmod(position, size)
        coordinates.append(coordinate)
    place, copies = 0, 1
    for size, coordinate, placement in zip(
        layout.mesh_shape, reversed(coordinates), layout.placements, strict=True
    ):
        if placement == REPLICATE:
            place, copies = place * size + coordinate, copies * size
    return place == xxhash.xxh3_64_intdigest(fqn.encode()) % copies
