"""Gloo ranks in processes of their own, which save and load on command.

Belongs here: the processes, their states of DTensors, and their clock: from the first rank's begin
to the last one's end, processor seconds and bytes read of all together. Does not belong here:
which cases there are (``io_cases``).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.io_columns import Dcp, Ours, Raw, Way
from benchmarks.io_state import model_shapes, model_state, state_bytes, wide_shapes

__all__ = ["LAYOUTS", "Outcome", "Ranks", "sharded_state"]

_distributed: Any = dist
"""The store classes, which torch's type stubs do not export."""
LAYOUTS = ("rows", "columns", "2-D", "replicated", "wide rows", "wide columns")
"""How the state is sharded; "wide": the one of ``wide_shapes``."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one command took."""

    wall: float
    processor: float
    bytes_read: int
    """By the kernel's count, of all system calls of all ranks; where ranks hand bytes on, which
    the kernel counts as reads too, by the load's own report."""
    needed: int
    """Bytes of the ranks' own tensors."""


class Ranks:
    """``world_size`` processes; a context manager."""

    def __init__(self, world_size: int, nbytes: int, threads: int) -> None:
        self.world_size = world_size
        context = multiprocessing.get_context("spawn")
        # In none of the ranks, as torchrun's agent has it. A store in a file would do, but that
        # whoever waits for a key there looks again every 10 ms only.
        self._store = _distributed.TCPStore(
            "127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False
        )
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, world_size, self._store.port, nbytes, threads, there),
                daemon=True,
            )
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, layout: str, way: str, action: str, path: str) -> Outcome:
        """Have all ranks carry out ``action`` ("save" or "load") at once."""
        for pipe in self._pipes:
            pipe.send((layout, way, action, path))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            answer = pipe.recv()
            if isinstance(answer, str):
                raise RuntimeError(f"rank {rank}: {answer}")
            answers.append(answer)
        begins, ends, processors, reads, needed, reported = zip(*answers, strict=True)
        return Outcome(
            wall=max(ends) - min(begins),
            processor=sum(processors),
            bytes_read=sum(reads) if reported[0] is None else reported[0],
            needed=sum(needed),
        )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def _serve(
    rank: int, world_size: int, port: int, nbytes: int, threads: int, pipe: Connection
) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    torch.set_num_threads(1)
    store = _distributed.TCPStore("127.0.0.1", port, world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    states: dict[str, dict[str, Any]] = {}
    while True:
        try:
            layout, way, action, path = pipe.recv()
        except EOFError:
            break
        try:
            if layout not in states:
                states.clear()  # one at a time in memory
                states[layout] = sharded_state(layout, nbytes, world_size)
            timed = _timed(_way(way, rank, threads), action, states[layout], path)
            pipe.send(timed)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def _way(name: str, rank: int, threads: int) -> Way:
    ways: dict[str, Way] = {
        "ours": Ours(),
        "ours, no digests": Ours(verify=False),
        "ours, once": Ours(shared_reads="once"),
        "ours, once, no digests": Ours(shared_reads="once", verify=False),
        "ours, direct": Ours(shared_reads="direct"),
        "ours, direct, no digests": Ours(shared_reads="direct", verify=False),
        "raw floor": Raw(threads=threads, rank=rank),
        "DCP": Dcp(),
        "DCP best": Dcp(best=True),
    }
    return ways[name]


def _timed(
    way: Way, action: str, state: dict[str, Any], path: str
) -> tuple[float, float, float, int, int, int | None]:
    dist.barrier()
    read, processor, begin = _bytes_read(), time.process_time(), time.monotonic()
    getattr(way, action)(state, path)
    end = time.monotonic()
    handed_on = isinstance(way, Ours) and way.shared_reads == "once"
    return (
        begin,
        end,
        time.process_time() - processor,
        _bytes_read() - read,
        state_bytes(state),
        way.bytes_read if isinstance(way, Ours) and handed_on else None,
    )


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def sharded_state(layout: str, nbytes: int, world_size: int) -> dict[str, Any]:
    """The model's state as DTensors; every rank's local tensors have memory of their own."""
    if layout == "2-D" and world_size % 2 == 0 and world_size > 2:
        mesh = init_device_mesh("cpu", (world_size // 2, 2))
    else:
        mesh = init_device_mesh("cpu", (world_size,))
    kind = layout.removeprefix("wide ")
    shapes = model_shapes(nbytes) if kind == layout else wide_shapes(nbytes)
    state: dict[str, Any] = {}
    for copy, parameters in model_state(1 << 16).items():
        if copy == "trainer":
            state[copy] = parameters
            continue
        dtype = next(iter(parameters.values())).dtype
        state[copy] = {}
        for name, shape in shapes.items():
            placements: list[Any] = [Shard(0)] * mesh.ndim
            if kind == "columns" and len(shape) == 2:
                placements = [Shard(1)]
            elif kind == "2-D" and mesh.ndim == 2:
                placements = [Shard(0), Shard(1) if len(shape) == 2 else Replicate()]
            elif kind == "replicated":
                placements = [Replicate()]
            local = list(shape)
            for dim, placement in enumerate(placements):
                if isinstance(placement, Shard):
                    local[placement.dim] //= mesh.size(dim)
            tensor = torch.full(local, 0.5, dtype=dtype)
            state[copy][name] = DTensor.from_local(tensor, mesh, placements, run_check=False)
    return state
