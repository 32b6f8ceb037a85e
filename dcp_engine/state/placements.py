"""Mesh and placements to boxes: which part of a tensor each rank of a mesh holds.

Pure functions on integers, for any coordinate of the mesh, so that one rank knows all ranks'
boxes. Placements are spelled ``"R"`` (replicate), ``"S(d)"`` (shard dimension d) and
``"_S(d,f)"`` (strided shard with split factor f). Does not belong here: ``DTensor`` itself
(``state.adapters.dtensor``).

Shards are cut as ``torch.chunk`` cuts: pieces of ``ceil(n / k)`` rows, the last ones shorter or
empty, mesh dimensions from left to right. A strided shard cuts into f pieces, each of these
into k, and takes one of each: its part may be several boxes.

Strided shards exist to say that a mesh dimension was cut later than those right of it: FSDP2 over
tensor parallelism cuts what tensor parallelism has cut. Taken literally, left to right, they give
the same boxes only where the sizes divide well enough (not for 50,257 rows on 4 x 2 ranks), and
what the ranks of such a model hold is the cut in true order. ``shard_order`` finds that order; the
adapter decides by the local shape.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dcp_engine.errors import UsageError
from dcp_engine.state.values import Box, MeshLayout

__all__ = [
    "REPLICATE",
    "LocalPart",
    "as_plain_shards",
    "coordinates",
    "layout_boxes",
    "local_part",
    "shard",
    "shard_order",
    "strided_shard",
]

REPLICATE = "R"

_SPELLING = re.compile(r"(?:S\((\d+)\)|_S\((\d+),(\d+)\))\Z")

_Pieces = list[tuple[int, int]]
"""Half-open ranges of one dimension of the global tensor, in the order of the local one."""


@dataclass(frozen=True, kw_only=True)
class LocalPart:
    """What one rank holds: ``boxes[i]`` of the global tensor lies at ``within[i]`` in the local
    tensor of shape ``shape``. Empty boxes are left out."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    within: tuple[tuple[int, ...], ...]


def shard(dim: int) -> str:
    """How ``Shard(dim)`` is spelled in a ``MeshLayout``."""
    return f"S({dim})"


def strided_shard(dim: int, split_factor: int) -> str:
    """How a strided shard is spelled in a ``MeshLayout``."""
    return f"_S({dim},{split_factor})"


def local_part(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[str],
    coordinate: Sequence[int],
) -> LocalPart:
    """The part of a tensor of global ``shape`` that the rank at ``coordinate`` holds.

    Args:
        shape: elements per dimension.
        mesh_shape: ranks per mesh dimension.
        placements: one per mesh dimension.
        coordinate: one index per mesh dimension.
    Raises:
        UsageError: a placement that is spelled wrongly or names a dimension that is not there.
    """
    pieces: list[_Pieces] = [[(0, n)] if n else [] for n in shape]
    for spelled, ranks, index in zip(placements, mesh_shape, coordinate, strict=True):
        if spelled == REPLICATE:
            continue
        dim, split_factor = _parse(spelled, len(shape))
        pieces[dim] = _cut(pieces[dim], split_factor, ranks, index)
    local_shape = tuple(sum(stop - start for start, stop in ranges) for ranges in pieces)
    boxes: list[Box] = []
    within: list[tuple[int, ...]] = []
    for combination in itertools.product(*(_with_position(ranges) for ranges in pieces)):
        boxes.append(
            Box(
                offsets=tuple(start for start, _, _ in combination),
                sizes=tuple(stop - start for start, stop, _ in combination),
            )
        )
        within.append(tuple(position for _, _, position in combination))
    return LocalPart(shape=local_shape, boxes=tuple(boxes), within=tuple(within))


def shard_order(mesh_shape: Sequence[int], placements: Sequence[str]) -> tuple[int, ...] | None:
    """The order in which the mesh dimensions were cut, if strided shards stand for an order.

    Returns:
        A permutation of the mesh dimensions such that plain shards, applied in this order, are
        meant; None if there is no strided shard, or one that no order explains.
    """
    orders: dict[int, list[int]] = {}
    rest: list[int] = []
    strided = False
    for mesh_dim in reversed(range(len(placements))):
        if placements[mesh_dim] == REPLICATE:
            rest.append(mesh_dim)
            continue
        # Only the tensor dimension is wanted here; whether the tensor has it is checked later.
        dim, split_factor = _parse(placements[mesh_dim], None)
        strided |= placements[mesh_dim].startswith("_")
        order = orders.setdefault(dim, [])
        # Of the dimensions to the right, those that cut before this one have split_factor parts.
        before = 0
        parts = 1
        while parts < split_factor and before < len(order):
            parts *= mesh_shape[order[before]]
            before += 1
        if parts != split_factor:
            return None
        order.insert(before, mesh_dim)
    if not strided:
        return None
    return (*rest[::-1], *(mesh_dim for dim in sorted(orders) for mesh_dim in orders[dim]))


def as_plain_shards(placements: Sequence[str]) -> tuple[str, ...]:
    """Strided shards spelled as plain ones, for use in ``shard_order``."""
    return tuple(p if p == REPLICATE else shard(_parse(p, None)[0]) for p in placements)


def layout_boxes(shape: Sequence[int], layout: MeshLayout) -> dict[int, tuple[Box, ...]]:
    """Every rank's boxes, by rank of the process group, in mesh order."""
    parts: dict[tuple[int, ...], tuple[Box, ...]] = {}
    result: dict[int, tuple[Box, ...]] = {}
    split = [placement != REPLICATE for placement in layout.placements]
    for rank, coordinate in zip(layout.ranks, coordinates(layout.mesh_shape), strict=True):
        # Ranks that differ along replicating mesh dimensions only hold the same part.
        key = tuple(c for c, s in zip(coordinate, split, strict=True) if s)
        if key not in parts:
            parts[key] = local_part(shape, layout.mesh_shape, layout.placements, coordinate).boxes
        result[rank] = parts[key]
    return result


def coordinates(mesh_shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All coordinates of a mesh, row by row."""
    return itertools.product(*(range(n) for n in mesh_shape))


def _parse(spelled: str, ndim: int | None) -> tuple[int, int]:
    match = _SPELLING.match(spelled)
    if match is None:
        raise UsageError(f"{spelled!r} is not a placement")
    dim = int(match[1] if match[1] is not None else match[2])
    split_factor = int(match[3] or 1)
    if split_factor < 1 or (ndim is not None and dim >= ndim):
        raise UsageError(f"placement {spelled!r} does not fit a tensor of {ndim} dimensions")
    return dim, split_factor


def _cut(pieces: _Pieces, split_factor: int, ranks: int, index: int) -> _Pieces:
    total = sum(stop - start for start, stop in pieces)
    outer = -(-total // split_factor)
    mine: _Pieces = []
    for begin in range(0, total, max(outer, 1)):
        length = min(outer, total - begin)
        inner = -(-length // ranks)
        low, high = min(index * inner, length), min((index + 1) * inner, length)
        for start, stop in _slice(pieces, begin + low, begin + high):
            if mine and mine[-1][1] == start:
                mine[-1] = (mine[-1][0], stop)
            else:
                mine.append((start, stop))
    return mine


def _slice(pieces: _Pieces, low: int, high: int) -> _Pieces:
    """Positions ``low`` to ``high`` of the concatenation of ``pieces``."""
    result: _Pieces = []
    position = 0
    for start, stop in pieces:
        begin = max(low - position, 0)
        end = min(high - position, stop - start)
        if begin < end:
            result.append((start + begin, start + end))
        position += stop - start
    return result


def _with_position(pieces: _Pieces) -> list[tuple[int, int, int]]:
    result = []
    position = 0
    for start, stop in pieces:
        result.append((start, stop, position))
        position += stop - start
    return result
