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
        told = sorted((queue.get() for _ in range(world_size)), key=lambda rank: rank["rank"])
    return {
        "world_size": world_size,
        "tensors": tensors,
        "first": _middle(told, slice(0, 1)),
        "second": _middle(told, slice(1, None)),
        "connections": max(rank["connections"] for rank in told),
    }


def _middle(told: Sequence[dict[str, Any]], which: slice) -> dict[str, float]:
    """Median over the saves of the slowest rank's times, of the busiest participant's traffic,
    and of the coordinator's."""
    coordinator, *others = [rank["saves"][which] for rank in told]
    result: dict[str, float] = {}
    for name in coordinator[0]:
        if name.endswith("ms"):
            result[name] = _median_of_worst(name, [coordinator, *others])
        else:
            result[name] = _median_of_worst(name, others)
            result[f"coordinator_{name}"] = _median_of_worst(name, [coordinator])
    return result


def _median_of_worst(name: str, ranks: Sequence[Sequence[dict[str, float]]]) -> float:
    return statistics.median(
        max(save[name] for save in at_once) for at_once in zip(*ranks, strict=True)
    )


_COLUMNS = {
    "planning ms": "plan_ms",
    "of it describing ms": "own_ms",
    "whole save ms": "save_ms",
    "a rank's bytes out": "bytes_out",
    "bytes in": "bytes_in",
    "calls": "calls",
    "coordinator's bytes out": "coordinator_bytes_out",
    "bytes in ": "coordinator_bytes_in",
    "calls ": "coordinator_calls",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    return markdown_table(
        ("ranks", "save", *_COLUMNS, "connections a rank"),
        [
            [
                str(row["world_size"]),
                save,
                *(number(row[save][name]) for name in _COLUMNS.values()),
                str(row["connections"]),
            ]
            for row in rows
            for save in ("first", "second")
        ],
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
        queue.put({"rank": rank, "saves": saves, "connections": engine.connections})
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
