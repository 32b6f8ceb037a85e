"""DTensors on every rank of a mesh, simulated in one process (a mesh needs no process group)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.state.adapters import GroupRanks, describe
from dcp_engine.state.placements import layout_boxes
from dcp_engine.state.values import EntryKind, MeshLayout, TensorValue
from tests.meshes import mesh_seen_by
from tests.torch_features import UNEVEN_STRIDED_SHARD

Placements = tuple[Placement, ...]


def local_of(whole: torch.Tensor, mesh: DeviceMesh, placements: Placements) -> torch.Tensor:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return whole.new_empty(0)
    for placement, n, index in zip(placements, mesh.mesh.shape, coordinate, strict=True):
        if not placement.is_replicate():
            parts, _ = placement._split_tensor(whole, n, with_padding=False)
            whole = parts[index].clone()
    return whole


def dtensor(
    local: torch.Tensor, whole: torch.Tensor, mesh: DeviceMesh, placements: Placements
) -> DTensor:
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def on(rank: int, value: Any, world: int = 8, **kwargs: Any) -> TensorValue:
    group = GroupRanks(ranks=tuple(range(world)), rank=rank)
    kind = kwargs.pop("kind", EntryKind.REPLICATED)
    (result,) = describe("w", value, kind=kind, group=group, **kwargs)
    assert isinstance(result, TensorValue)
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], np.ndarray, Placements]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    ranks = draw(st.permutations(range(28)))[: int(np.prod(mesh))]
    dims = st.integers(0, len(shape) - 1)
    placement = st.one_of(st.just(Replicate()), dims.map(Shard), dims.map(Shard))
    return shape, np.array(ranks).reshape(mesh), tuple(draw(placement) for _ in mesh)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_all_ranks_together_hold_the_tensor(
    case: tuple[tuple[int, ...], np.ndarray, Placements],
) -> None:
    shape, ranks, placements = case
    whole = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    rebuilt = torch.full(shape, -1.0)
    layouts: set[MeshLayout | None] = set()
    values = {}
    for rank in range(28):
        mesh = mesh_seen_by(rank, ranks.tolist())
        local = local_of(whole, mesh, placements)
        value = on(rank, dtensor(local, whole, mesh, placements), 28)
        assert (value.shape, value.dtype) == (shape, torch.float32)
        assert (value.kind is EntryKind.REPLICATED) == all(p.is_replicate() for p in placements)
        if rank not in ranks:
            assert value.boxes == ()
        for box, tensor in zip(value.boxes, value.tensors, strict=True):
            where = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            assert torch.equal(whole[where], tensor)
            rebuilt[where] = tensor
        layouts.add(value.layout)
        values[rank] = value
    assert torch.equal(rebuilt, whole)
    (layout,) = layouts
    assert layout is not None
    derived = layout_boxes(shape, layout)
    assert derived == {rank: values[rank].boxes for rank in ranks.reshape(-1).tolist()}


def test_group_ranks_are_not_global_ranks() -> None:
    group = GroupRanks(ranks=(6, 2, 4, 0), rank=1)
    whole = torch.arange(6.0)
    mesh = mesh_seen_by(2, [4, 2])
    local = local_of(whole, mesh, (Shard(0),))
    value = dtensor(local, whole, mesh, (Shard(0),))
    (result,) = describe("w", value, kind=EntryKind.REPLICATED, group=group)
    assert isinstance(result, TensorValue)
    assert result.layout == MeshLayout(mesh_shape=(2,), ranks=(2, 1), placements=("S(0)",))
    assert result.boxes[0].offsets == (3,)


def fsdp_part(whole: torch.Tensor, dp: int, tp: int, i: int, j: int) -> torch.Tensor:
    parts = Shard(0)._split_tensor(whole, tp, with_padding=False)[0]
    return Shard(0)._split_tensor(parts[j], dp, with_padding=False)[0][i].clone()


@pytest.mark.parametrize("n", [7, 8, 13, 1, 25])
@pytest.mark.parametrize("order", ["fsdp", "literal"])
def test_strided_shards_in_either_reading(n: int, order: str) -> None:
    dp, tp = 4, 2
    whole = torch.arange(float(n))
    placements = (_StridedShard(0, split_factor=tp), Shard(0))
    covered = []
    for rank in range(dp * tp):
        mesh = mesh_seen_by(rank, np.arange(dp * tp).reshape(dp, tp).tolist())
        if order == "fsdp":
            local = fsdp_part(whole, dp, tp, *divmod(rank, tp))
        elif n % (dp * tp) and not UNEVEN_STRIDED_SHARD:
            pytest.skip("this torch does not cut uneven strided shards so")
        else:
            local = local_of(whole, mesh, placements)
        value = on(rank, dtensor(local, whole, mesh, placements))
        for box, tensor in zip(value.boxes, value.tensors, strict=True):
            span = range(box.offsets[0], box.offsets[0] + box.sizes[0])
            assert tensor.tolist() == [float(x) for x in span]
            covered += span
    assert sorted(covered) == list(range(n))


def test_a_strided_shard_that_could_lie_in_two_places_is_refused() -> None:
    whole = torch.arange(27.0)
    placements = (_StridedShard(0, split_factor=4), Shard(0))
    mesh = mesh_seen_by(10, np.arange(12).reshape(3, 4).tolist())  # coordinate (2, 2)
    value = dtensor(torch.zeros(1), whole, mesh, placements)
    with pytest.raises(UnsupportedStateError, match="order of the cuts"):
        on(10, value, 12)


def test_several_boxes_are_views_of_one_local_tensor() -> None:
    whole = torch.arange(16.0).reshape(8, 2)
    mesh = mesh_seen_by(1, [0, 1])
    placements = (_StridedShard(0, split_factor=2),)
    local = local_of(whole, mesh, placements)
    value = on(1, dtensor(local, whole, mesh, placements), for_load=True)
    assert [box.offsets for box in value.boxes] == [(2, 0), (6, 0)]
    for tensor in value.tensors:
        tensor.fill_(9)
    assert (local == 9).all()


def test_parameters_and_requires_grad() -> None:
    mesh = mesh_seen_by(0, [0])
    value = torch.nn.Parameter(dtensor(torch.ones(4), torch.ones(4), mesh, (Shard(0),)))
    result = on(0, value, for_load=True)
    assert result.requires_grad
    assert result.kind is EntryKind.SHARDED
    assert not result.tensors[0].requires_grad
    result.tensors[0].fill_(3)
    assert (value.to_local() == 3).all()


def refusal(rank: int, value: Any, **kwargs: Any) -> str:
    with pytest.raises(UnsupportedStateError) as info:
        on(rank, value, **kwargs)
    assert info.value.kind == "unsupported_state"
    assert (info.value.tensor, info.value.rank) == ("w", rank)
    return str(info.value)


def test_partial_is_refused() -> None:
    mesh = mesh_seen_by(1, [0, 1])
    value = DTensor.from_local(torch.ones(4), mesh, (Partial(),), run_check=False)
    assert "not yet reduced" in refusal(1, value)


@pytest.mark.parametrize("rows", [1, 3])
def test_ragged_shards_are_refused(rows: int) -> None:
    mesh = mesh_seen_by(0, [0, 1])
    value = dtensor(torch.ones(rows), torch.ones(4), mesh, (Shard(0),))
    message = refusal(0, value)
    assert f"({rows},)" in message
    assert "(2,)" in message


def test_a_mesh_outside_the_group_is_refused() -> None:
    mesh = mesh_seen_by(1, [0, 1, 9])
    value = dtensor(torch.ones(1), torch.ones(3), mesh, (Shard(0),))
    assert "[9]" in refusal(1, value)


def test_alone_the_local_part_is_described_without_a_layout() -> None:
    mesh = mesh_seen_by(1, [0, 1])
    value = dtensor(torch.ones(2), torch.ones(4), mesh, (Shard(0),))
    (result,) = describe("w", value, kind=EntryKind.REPLICATED, group=GroupRanks())
    assert isinstance(result, TensorValue)
    assert result.layout is None
    assert result.shape == (4,)
    assert [box.offsets for box in result.boxes] == [(2,)]


def test_per_rank_dtensors_are_refused() -> None:
    value = dtensor(torch.ones(4), torch.ones(4), mesh_seen_by(0, [0]), (Shard(0),))
    assert "PerRank" in refusal(0, value, kind=EntryKind.PER_RANK)


def test_meta_and_sparse_locals_are_refused() -> None:
    mesh = mesh_seen_by(0, [0])
    value = dtensor(torch.ones(4, device="meta"), torch.ones(4), mesh, (Shard(0),))
    assert "meta" in refusal(0, value)


def test_an_async_local_tensor_is_waited_for() -> None:
    local = torch.ones(4)
    waiting = AsyncCollectiveTensor(local)
    waiting.completed = True
    value = dtensor(waiting, torch.ones(4), mesh_seen_by(0, [0]), (Shard(0),))
    result = on(0, value, for_load=True)
    assert type(result.tensors[0]) is torch.Tensor
    assert result.tensors[0].data_ptr() == local.data_ptr()
    plain = on(0, waiting)
    assert plain.tensors[0].data_ptr() == local.data_ptr()


class Wrapping(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapping:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Wrapping:
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [a.inner if isinstance(a, Wrapping) else a for a in args]
        return cls(func(*args, **(kwargs or {})))


def test_a_dtensor_of_wrappers_is_refused() -> None:
    value = dtensor(Wrapping(torch.ones(4)), torch.ones(4), mesh_seen_by(0, [0]), (Shard(0),))
    assert "Wrapping" in refusal(0, value)


def test_a_wrapper_of_dtensors_is_taken_apart() -> None:
    inner = dtensor(torch.ones(2), torch.ones(4), mesh_seen_by(1, [0, 1]), (Shard(0),))
    group = GroupRanks(ranks=(0, 1), rank=1)
    values = describe("w", Wrapping(inner), kind=EntryKind.REPLICATED, group=group)
    assert [value.fqn for value in values] == ["w.__tensor_flatten__", "w.inner"]
    assert values[1].kind is EntryKind.SHARDED
