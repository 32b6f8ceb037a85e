"""State dicts whose every element is known, in any sharding, on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import (
    Shard as ShardOfTensor,
)
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dcp_engine import PerRank


def whole(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The tensor called ``name``: distinct values, the same in every process."""
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(name))
    flat = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) * 7 + seed
    if dtype is torch.bool:
        return (flat % 3 == 0).reshape(shape)
    return (flat % 251 - 100).reshape(shape).to(dtype)


SHARDED: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "rows": ((13, 6), torch.float32),
    "columns": ((6, 13), torch.bfloat16),
    "replicated": ((5, 3), torch.float64),
    "few": ((2, 3), torch.int64),
    "grid": ((9, 10), torch.float16),
    "hybrid": ((11, 4), torch.float32),
    "twice": ((16, 3), torch.float32),
    "part_mesh": ((7,), torch.float32),
}


def meshes(world_size: int) -> tuple[DeviceMesh, DeviceMesh | None]:
    """A mesh over all ranks, and a grid of two columns where the number of ranks allows it."""
    line = init_device_mesh("cpu", (world_size,))
    grid = init_device_mesh("cpu", (world_size // 2, 2)) if world_size % 2 == 0 else None
    return line, grid


def sharded(world_size: int, *, filled: bool, turned: bool = False) -> dict[str, DTensor]:
    """Every layout; ``turned`` exchanges rows for columns, for a load into another layout."""
    line, grid = meshes(world_size)
    rows, columns = (1, 0) if turned else (0, 1)
    layouts: dict[str, tuple[DeviceMesh, list[Any]]] = {
        "rows": (line, [Shard(rows)]),
        "columns": (line, [Shard(columns)]),
        "replicated": (line, [Replicate()]),
        "few": (line, [Shard(0)]),
        "grid": (grid or line, [Shard(rows), Shard(columns)] if grid else [Shard(rows)]),
        "hybrid": (grid or line, [Replicate(), Shard(rows)] if grid else [Shard(rows)]),
        "twice": (grid or line, [Shard(0), Shard(0)] if grid else [Shard(0)]),
    }
    result = {}
    for name, (mesh, placements) in layouts.items():
        tensor = whole(name, *SHARDED[name])
        result[name] = distribute_tensor(
            tensor if filled else torch.zeros_like(tensor), mesh, placements
        )
    return result


def part_mesh(*, filled: bool) -> DTensor:
    """A tensor on rank 0 alone (mesh of one rank); every rank holds the DTensor object."""
    mesh = DeviceMesh("cpu", [0])
    tensor = whole("part_mesh", *SHARDED["part_mesh"])
    return DTensor.from_local(
        (tensor if filled else torch.zeros_like(tensor))
        if dist.get_rank() == 0
        else torch.empty(0),
        mesh,
        [Replicate()],
        shape=tensor.shape,
        stride=tensor.stride(),
        run_check=False,
    )


def sharded_tensor(world_size: int, *, filled: bool) -> ShardedTensor:
    """A ShardedTensor of two rows a rank."""
    rank = dist.get_rank()
    tensor = whole("sharded_tensor", (2 * world_size, 3))
    mine = tensor[2 * rank : 2 * rank + 2].clone()
    shard = ShardOfTensor.from_tensor_and_offsets(
        mine if filled else torch.zeros_like(mine), [2 * rank, 0], rank
    )
    return torch.distributed._shard.sharded_tensor.init_from_local_shards(
        [shard], 2 * world_size, 3
    )


PLAIN: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "scalar": ((), torch.float32),
    "empty": ((0, 4), torch.float32),
    "half": ((3, 5), torch.float16),
    "byte": ((17,), torch.uint8),
    "flag": ((9,), torch.bool),
    "complex": ((4,), torch.complex64),
    "large": ((300, 1000), torch.float32),
}


def plain(*, filled: bool) -> dict[str, Any]:
    """Tensors that every rank holds whole, with views and ties."""
    result: dict[str, Any] = {}
    for name, (shape, dtype) in PLAIN.items():
        tensor = whole(name, shape, dtype)
        result[name] = tensor if filled else torch.zeros_like(tensor)
    base = whole("transposed", (4, 6))
    result["transposed"] = (base if filled else torch.zeros_like(base)).t()
    result["tied"] = result["half"]
    return result


def objects(*, filled: bool) -> dict[str, Any]:
    """Values that are not tensors, small and large, nested."""
    if not filled:
        return {"step": 0, "name": "", "groups": [{"lr": 0.0}], "big": b"", "pair": None}
    return {
        "step": 12,
        "name": "é",
        "groups": [{"lr": 1e-3}],
        "big": bytes(range(256)) * 40,
        "pair": (1, float("inf")),
    }


def state(
    world_size: int, *, filled: bool, turned: bool = False, own: bool = True
) -> dict[str, Any]:
    """All of the above in one state dict."""
    rank = dist.get_rank()
    result: dict[str, Any] = {
        "sharded": sharded(world_size, filled=filled, turned=turned),
        "part_mesh": part_mesh(filled=filled),
        "plain": plain(filled=filled),
        "objects": objects(filled=filled),
    }
    if own:
        result["sharded_tensor"] = sharded_tensor(world_size, filled=filled)
        result["own"] = PerRank(
            {
                "rng": torch.full((4,), rank if filled else -1),
                "seed": rank if filled else None,
            }
        )
    return result


def differences(state_dict: dict[str, Any], world_size: int, *, own: bool = True) -> list[str]:
    """Names of everything in ``state_dict`` that is not what ``state(filled=True)`` holds."""
    wrong = []
    for name, tensor in state_dict["sharded"].items():
        if not torch.equal(tensor.full_tensor(), whole(name, *SHARDED[name])):
            wrong.append(name)
    if dist.get_rank() == 0:
        local = state_dict["part_mesh"].to_local()
        if not torch.equal(local, whole("part_mesh", *SHARDED["part_mesh"])):
            wrong.append("part_mesh")
    expected = plain(filled=True)
    for name, tensor in state_dict["plain"].items():
        if not torch.equal(tensor, expected[name]):
            wrong.append(name)
    if state_dict["objects"] != objects(filled=True):
        wrong.append(f"objects {state_dict['objects']}")
    if own:
        rank = dist.get_rank()
        shard = state_dict["sharded_tensor"].local_shards()[0].tensor
        full = whole("sharded_tensor", (2 * world_size, 3))
        if not torch.equal(shard, full[2 * rank : 2 * rank + 2]):
            wrong.append("sharded_tensor")
        mine = state_dict["own"].value
        if mine["seed"] != rank or not torch.equal(mine["rng"], torch.full((4,), rank)):
            wrong.append(f"own {mine}")
    return wrong
