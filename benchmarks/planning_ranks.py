"""Planning between real processes: bytes and calls through the store, and wall time.

Each rank is a process with a gloo group over one TCPStore, and saves T small DTensors, 100
replicated tensors and 10 objects twice with one ``Engine``. Belongs here: starting the ranks and
counting in them. Does not belong here: simulation.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.planning_layouts import NORM, object_names
from benchmarks.report import markdown_table, number

__all__ = ["run", "table"]

SAVES = 4
"""The first plans, the others are looked at for medians."""


def run(world_size: int, tensors: int) -> dict[str, Any]:
    """Medians over the ranks, and over the saves after the first."""
    with tempfile.TemporaryDirectory(prefix="dcp-engine-benchmark-") as directory:
        store = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(
            _rank, (world_size, tensors, store.port, directory, queue), nprocs=world_size, join=True
        )
        told = [queue.get() for _ in range(world_size)]
    saves = list(zip(*(rank["saves"] for rank in told), strict=True))

    def middle(name: str, of: Sequence[Sequence[dict[str, float]]]) -> float:
        return statistics.median(max(rank[name] for rank in save) for save in of)

    names = list(saves[0][0])
    return {
        "world_size": world_size,
        "tensors": tensors,
        "first": {name: middle(name, saves[:1]) for name in names},
        "second": {name: middle(name, saves[1:]) for name in names},
        "connections": max(rank["connections"] for rank in told),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown; the slowest or busiest rank counts."""
    cells = []
    for row in rows:
        for save in ("first", "second"):
            figures = row[save]
            cells.append(
                [
                    str(row["world_size"]),
                    save,
                    *(
                        number(figures[name])
                        for name in ("plan_ms", "save_ms", "bytes_out", "bytes_in", "calls")
                    ),
                    str(row["connections"]),
                ]
            )
    return markdown_table(
        (
            "ranks",
            "save",
            "planning ms",
            "whole save ms",
            "bytes out a rank",
            "bytes in a rank",
            "store calls a rank",
            "connections",
        ),
        cells,
    )


def _rank(rank: int, world_size: int, tensors: int, port: int, directory: str, queue: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, None, False, timeout=timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    from benchmarks.watched_engine import WatchedEngine
    from storage_backends.filesystem import FileSystemWriter as writer

    state = _state(world_size, tensors)
    with WatchedEngine() as engine:
        saves = []
        for number_ in range(SAVES):
            dist.barrier()
            began = time.perf_counter()
            engine.save(state, storage_writer=writer(Path(directory) / f"step-{number_}"))
            seconds = time.perf_counter() - began
            saves.append({**engine.take(), "save_ms": seconds * 1e3})
        queue.put({"saves": saves, "connections": engine.connections})
    dist.barrier()
    dist.destroy_process_group()


def _state(world_size: int, tensors: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world_size,))
    state: dict[str, Any] = {
        f"layers.{number}.weight": DTensor.from_local(
            torch.zeros(4, 16), mesh, [Shard(0)], run_check=False
        )
        for number in range(tensors)
    }
    state |= {f"layers.{number}.norm": torch.zeros(NORM) for number in range(100)}
    state |= {name: {"value": 7} for name in object_names()}
    return state
