"""What FSDP2 over tensor parallelism really holds, on every rank of a fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_engine.state.adapters import GroupRanks, describe
from dcp_engine.state.placements import layout_boxes
from dcp_engine.state.values import EntryKind, TensorValue
from tests.meshes import dtensor_on
from tests.torch_features import LOCAL_PARALLELIZE, UNEVEN_STRIDED_SHARD

DP, TP = 4, 2


@contextmanager
def fake_rank(rank: int) -> Iterator[GroupRanks]:
    dist.init_process_group("fake", rank=rank, world_size=DP * TP, store=FakeStore())
    try:
        yield GroupRanks(ranks=tuple(range(DP * TP)), rank=rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rows", [16, 25])
def test_uneven_rows_are_where_fsdp_put_them(rows: int) -> None:
    """25 rows on 4 x 2 ranks: read literally, the placements would put 2 rows where FSDP has 1."""
    whole = torch.arange(rows * 3.0).reshape(rows, 3)
    rebuilt = torch.full_like(whole, -1)
    for rank in range(DP * TP):
        with fake_rank(rank) as group:
            mesh = init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
            model = torch.nn.Linear(3, rows, bias=False)
            with torch.no_grad():
                model.weight.copy_(whole)
            if LOCAL_PARALLELIZE:
                parallelize_module(model, mesh["tp"], ColwiseParallel(), src_data_rank=None)
            else:  # rank 0 would hand out its rows, which a fake group does not do
                mine = torch.chunk(whole, TP)[rank % TP].clone()
                weight = dtensor_on(mesh["tp"], [Shard(0)], mine, whole.shape)
                model.weight = torch.nn.Parameter(weight)
            try:
                fully_shard(model, mesh=mesh["dp"])
            except NotImplementedError:
                if UNEVEN_STRIDED_SHARD:
                    raise
                pytest.skip("this torch's FSDP over tensor parallelism takes even sizes only")
            weight = model.state_dict()["weight"]
            (value,) = describe("w", weight, kind=EntryKind.REPLICATED, group=group)
            assert isinstance(value, TensorValue)
            assert value.layout is not None
            assert layout_boxes(value.shape, value.layout)[rank] == value.boxes
            for box, tensor in zip(value.boxes, value.tensors, strict=True):
                top = box.offsets[0]
                assert torch.equal(whole[top : top + box.sizes[0]], tensor)
                rebuilt[top : top + box.sizes[0]] = tensor
    assert torch.equal(rebuilt, whole)
