"""What the children of the crash tests do. Runs in processes of the fork server.

Belongs here: functions ``f(say, ...)``. Does not belong here: killing and judging (the tests).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import dcp_engine as dcp

__all__ = ["destination", "save_for_ever", "state", "value_of"]

ROWS = 60_000
"""Of the sharded tensor: 480 kB a rank of two."""


def state(value: float, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """A checkpoint that holds one number everywhere, on some 1 MB; sharded over ``mesh``."""
    w: Any = torch.full((ROWS, 4), value)
    if mesh is not None:
        # Without a word to the other rank, which may be dead.
        local = w[: ROWS // mesh.size()]
        w = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    return {
        "model": {"w": w, "b": torch.full((1000,), value)},
        "long": [value] * 2000,
        "step": value,
    }


def destination() -> dict[str, Any]:
    """What ``state`` is loaded into, on one rank."""
    return state(-1.0)


def value_of(loaded: dict[str, Any]) -> float:
    """The one number that it holds; fails for a mixture."""
    w = loaded["model"]["w"]
    w = w.to_local() if isinstance(w, DTensor) else w
    values = {
        *w.unique().tolist(),
        *loaded["model"]["b"].unique().tolist(),
        *loaded["long"],
        loaded["step"],
    }
    assert len(values) == 1, f"a mixture of {sorted(values)}"
    return float(values.pop())


@contextmanager
def joined(rank: int, world_size: int, port: int, prefix: str) -> Iterator[None]:
    """A gloo group over the store at ``port``."""
    timeout = timedelta(seconds=60)
    store = dist.TCPStore(
        "localhost", port, None, False, timeout=timeout, wait_for_workers=False
    )
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(prefix, store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    yield
    dist.destroy_process_group()


def save_for_ever(
    say: Callable[..., None],
    rank: int,
    world_size: int,
    port: int,
    prefix: str,
    path: str,
    first: float,
    count: int,
    timeout: float,
) -> None:
    """Save ``first``, ``first + 1`` ... to one place, and say so before and after each; until
    somebody ends it, or ``count`` are done. ``timeout`` is for each save: a rank that is dead
    before a save begins cannot be told from one that is late."""
    with joined(rank, world_size, port, prefix):
        mesh = init_device_mesh("cpu", (world_size,))
        say("ready", rank, os.getpid())
        for number in range(count):
            value = first + number
            say("begins", rank, value)
            try:
                dcp.save(
                    state(value, mesh), checkpoint_id=path, timeout=timeout, stall_timeout=1.5
                )
            except dcp.CheckpointException as error:
                say("failed", rank, value, error.kind)
                return
            say("returned", rank, value)
