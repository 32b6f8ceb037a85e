"""Device meshes and what lies on them, as a rank sees it that the process need not be."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

__all__ = ["dtensor_on", "mesh_seen_by"]

_TAKES_A_RANK = "_rank" in inspect.signature(DeviceMesh).parameters
_PATCHED = threading.Lock()


def mesh_seen_by(rank: int, ranks: Any) -> DeviceMesh:
    """A mesh of the global ``ranks`` (nested sequences or a tensor), without a process group."""
    mesh = torch.as_tensor(ranks)
    make: Any = DeviceMesh
    if _TAKES_A_RANK:
        return make("cpu", mesh, _init_backend=False, _rank=rank)
    # torch before 2.9 asks for the rank of the process.
    with _PATCHED, mock.patch.object(device_mesh, "get_rank", return_value=rank):
        return make("cpu", mesh, _init_backend=False)


def dtensor_on(
    mesh: DeviceMesh, placements: Sequence[Placement], local: torch.Tensor, shape: Sequence[int]
) -> DTensor:
    """As ``distribute_tensor`` makes them. ``from_local`` takes ``shape=()`` for no shape, and
    torch 2.6 has no view, which it takes, of a ``LocalShardsWrapper`` of several shards."""
    whole = torch.empty(tuple(shape), dtype=local.dtype, device="meta")
    meta = TensorMeta(shape=whole.shape, stride=whole.stride(), dtype=local.dtype)
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta)
    make: Any = DTensor
    return make(local, spec, requires_grad=False)
