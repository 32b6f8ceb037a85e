"""Boxes from mesh and placements: against torch's own arithmetic and against splitting tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_engine.errors import UsageError
from dcp_engine.geometry.tiling import find_tiling_fault
from dcp_engine.state.placements import (
    as_plain_shards,
    coordinates,
    layout_boxes,
    local_part,
    shard,
    shard_order,
    strided_shard,
)
from dcp_engine.state.values import Box, MeshLayout
from tests.meshes import mesh_seen_by
from tests.torch_features import UNEVEN_STRIDED_SHARD

Case = tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(0, 11), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dim = st.integers(0, len(shape) - 1)
    placement = st.one_of(
        st.just("R"),
        dim.map(shard),
        st.builds(strided_shard, dim, st.integers(1, 4)),
    )
    return shape, mesh, tuple(draw(placement) for _ in mesh)


def torch_placement(spelled: str) -> Replicate | Shard | _StridedShard:
    if spelled == "R":
        return Replicate()
    numbers = [int(n) for n in spelled[spelled.index("(") + 1 : -1].split(",")]
    if spelled.startswith("_S"):
        return _StridedShard(numbers[0], split_factor=numbers[1])
    return Shard(numbers[0])


def split(whole: torch.Tensor, case: Case, coordinate: tuple[int, ...]) -> torch.Tensor:
    """Cut ``whole`` as distribute_tensor does, with torch's own placements."""
    _, mesh, placements = case
    local = whole
    for spelled, ranks, index in zip(placements, mesh, coordinate, strict=True):
        placement: Any = torch_placement(spelled)
        if spelled.startswith("_S") and not UNEVEN_STRIDED_SHARD:
            pieces = torch.chunk(local, placement.split_factor, placement.dim)
            cut = Shard(placement.dim)
            parts = [cut._split_tensor(p, ranks, with_padding=False)[0][index] for p in pieces]
            local = torch.cat(parts, placement.dim)
        elif spelled != "R":
            local = placement._split_tensor(local, ranks, with_padding=False)[0][index]
    return local


@settings(max_examples=150, deadline=None)
@given(cases())
def test_parts_are_what_torch_distributes(case: Case) -> None:
    shape, mesh, placements = case
    whole = torch.arange(int(np.prod(shape))).reshape(shape)
    ranks = np.arange(np.prod(mesh)).reshape(mesh)
    strided = any(p.startswith("_S") for p in placements)
    for rank, coordinate in enumerate(coordinates(mesh)):
        part = local_part(shape, mesh, placements, coordinate)
        local = split(whole, case, coordinate)
        assert part.shape == tuple(local.shape)
        rebuilt = torch.full(part.shape, -1)
        for box, within in zip(part.boxes, part.within, strict=True):
            source = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            target = tuple(slice(o, o + n) for o, n in zip(within, box.sizes, strict=True))
            rebuilt[target] = whole[source]
        assert torch.equal(rebuilt, local)
        if strided and not UNEVEN_STRIDED_SHARD:
            continue  # torch counts these as if plain shards had been cut in another order
        torch_shape, torch_offset = compute_local_shape_and_global_offset(
            shape, mesh_seen_by(rank, ranks), [torch_placement(p) for p in placements]
        )
        assert part.shape == tuple(torch_shape)
        if part.boxes:
            assert part.boxes[0].offsets == tuple(torch_offset)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_parts_of_all_ranks_tile_the_tensor(case: Case) -> None:
    shape, mesh, placements = case
    ranks = tuple(range(7, 7 + int(np.prod(mesh))))
    layout = MeshLayout(mesh_shape=mesh, ranks=ranks, placements=placements)
    by_rank = layout_boxes(shape, layout)
    assert list(by_rank) == list(ranks)
    for rank, coordinate in zip(ranks, coordinates(mesh), strict=True):
        assert by_rank[rank] == local_part(shape, mesh, placements, coordinate).boxes
    boxes = sorted({(b.offsets, b.sizes) for held in by_rank.values() for b in held})
    columns = np.array(boxes, np.int64).reshape(len(boxes), 2, len(shape))
    assert find_tiling_fault(np.array(shape), columns[:, 0], columns[:, 1]) is None


FSDP_CASES = [  # mesh, placements as FSDP2 spells them, mesh dims in the order of the cuts
    ((3, 2), (strided_shard(0, 2), shard(0)), (1, 0)),
    ((4, 2), ("_S(0,2)", "S(0)"), (1, 0)),
    ((2, 3, 4), ("R", "_S(0,4)", "S(0)"), (0, 2, 1)),
    ((2, 3, 4), ("_S(0,12)", "S(0)", "S(0)"), (1, 2, 0)),
    ((2, 3, 4), ("_S(0,12)", "_S(0,4)", "S(0)"), (2, 1, 0)),
    ((3, 2, 2), ("_S(0,2)", "S(0)", "S(1)"), (1, 0, 2)),
]


@pytest.mark.parametrize(("mesh", "placements", "order"), FSDP_CASES)
def test_strided_shards_of_fsdp_stand_for_an_order(
    mesh: tuple[int, ...], placements: tuple[str, ...], order: tuple[int, ...]
) -> None:
    assert shard_order(mesh, placements) == order
    plain = as_plain_shards(placements)
    differ = 0
    for n in range(1, 40):
        whole = torch.arange(2 * n).reshape(n, 2)
        for coordinate in coordinates(mesh):
            mine = whole
            for d in order:
                if plain[d] != "R":
                    cut = torch_placement(plain[d])
                    mine = cut._split_tensor(mine, mesh[d], with_padding=False)[0][coordinate[d]]
            part = local_part(
                (n, 2),
                [mesh[d] for d in order],
                [plain[d] for d in order],
                [coordinate[d] for d in order],
            )
            assert len(part.boxes) <= 1
            assert part.shape == tuple(mine.shape)
            if part.boxes:
                (o0, o1), (n0, n1) = part.boxes[0].offsets, part.boxes[0].sizes
                assert torch.equal(whole[o0 : o0 + n0, o1 : o1 + n1], mine)
            literal = local_part((n, 2), mesh, placements, coordinate)
            differ += literal.boxes != part.boxes
            if n % int(np.prod(mesh)) == 0:
                assert literal == part
    assert differ > 0


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((4,), ("S(0)",)),
        ((2, 2), ("R", "S(1)")),
        ((2,), ("_S(0,2)",)),
        ((2, 3), ("_S(0,2)", "S(0)")),
        ((2, 3), ("_S(0,3)", "S(1)")),
    ],
)
def test_no_order_is_invented(mesh: tuple[int, ...], placements: tuple[str, ...]) -> None:
    assert shard_order(mesh, placements) is None


def test_a_strided_shard_alone_is_several_boxes() -> None:
    part = local_part((8, 2), (2,), (strided_shard(0, 2),), (1,))
    assert part.boxes == (Box(offsets=(2, 0), sizes=(2, 2)), Box(offsets=(6, 0), sizes=(2, 2)))
    assert part.within == ((0, 0), (2, 0))


def test_scalars_are_whole_everywhere() -> None:
    part = local_part((), (2, 2), ("R", "R"), (1, 0))
    assert part.boxes == (Box(offsets=(), sizes=()),)
    assert part.shape == ()


@pytest.mark.parametrize("spelled", ["S(1)", "_S(0,0)", "P", "S(-1)", "S()", "S(0)x", ""])
def test_bad_placements_are_refused(spelled: str) -> None:
    with pytest.raises(UsageError):
        local_part((4,), (2,), (spelled,), (0,))
