"""What the rank processes run in the tests of the pool itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh


def ids() -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"boom on {rank}")


def hang_on(rank: int) -> None:
    while dist.get_rank() == rank:
        time.sleep(0.1)


def lose(rank: int, how: str) -> str:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    return "here"


def whole_tensor(rows: int) -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = distribute_tensor(torch.arange(rows), mesh, [Shard(0)]) + 0
    return list(tensor.full_tensor().tolist())


def unreadable() -> object:
    return lambda: None


if __name__ == "__main__":
    # A parent that starts ranks and is killed: `python -m tests.multirank.pool_cases`.
    from tests.multirank.pool import RankPool

    pool = RankPool()
    print(*(pid for _, _, pid in pool.run(2, ids)), flush=True)
    child = multiprocessing.active_children()[0].pid
    if child is not None:
        os.kill(child, signal.SIGSTOP)
    sys.stdin.read()
