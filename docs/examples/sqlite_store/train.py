"""Saves and loads a sharded tensor on all ranks of a job:

torchrun --nproc-per-node 2 train.py sqlite:///tmp/checkpoint.db
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dcp_engine as dcp


def state(filled: bool) -> dict[str, DTensor | int]:
    """A matrix, its rows on all ranks, and a step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(70.0).reshape(10, 7) if filled else torch.zeros(10, 7)
    return {"matrix": distribute_tensor(whole, mesh, [Shard(0)]), "step": 7 if filled else 0}


def main() -> None:
    """Nothing but the URL says where the checkpoint is."""
    checkpoint = sys.argv[1]
    dist.init_process_group("gloo")
    saved = state(filled=True)
    dcp.save(saved, checkpoint_id=checkpoint)
    loaded = state(filled=False)
    dcp.load(loaded, checkpoint_id=checkpoint)
    same = torch.equal(loaded["matrix"].to_local(), saved["matrix"].to_local())
    print(f"rank {dist.get_rank()}: step {loaded['step']}, {'same' if same else 'OTHER'} rows")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
