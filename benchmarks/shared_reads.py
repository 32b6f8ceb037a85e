"""Reading once and handing on, against every rank for itself: the figures behind "auto".

A replicated state is loaded by 2 and 4 ranks of this machine, warm from its page cache, and once
more from a medium made slow: all ranks together get so many bytes a second, as from a network
file system. Belongs here: this one comparison. Columns of one row are measured by turns.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing

import dcp_engine as dcp
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.planning.columns import LoadColumns

__all__ = ["add_arguments", "main", "measure"]

Ways = Literal["direct", "once"]
_torch: Any = torch
"""What torch's type stubs do not name."""
WAYS: tuple[Ways, ...] = ("direct", "once")


class SlowReader(dcp.FileSystemReader):
    """Takes as long over its bytes as a medium that all ranks share takes."""

    bytes_per_second: float = 0.0

    def read_columns(
        self, manifest: Any, plan: LoadColumns, tensors: Sequence[torch.Tensor], check: Any
    ) -> int:
        begin = time.perf_counter()
        count = super().read_columns(manifest, plan, tensors, check)
        due = begin + count * dist.get_world_size() / self.bytes_per_second
        time.sleep(max(0.0, due - time.perf_counter()))
        return count


def measure(
    world_size: int, *, mib: int, rounds: int, bytes_per_second: float | None
) -> dict[str, Any]:
    """One row: medians in seconds of both ways, by way, of the slowest rank."""
    with tempfile.TemporaryDirectory() as folder:
        request = (world_size, folder, mib, rounds, bytes_per_second)
        _torch.multiprocessing.spawn(_rank, args=request, nprocs=world_size)
        with open(f"{folder}/result.json") as file:
            times = json.load(file)
    row: dict[str, Any] = {"ranks": world_size, "mib": mib, "bytes_per_second": bytes_per_second}
    for way in WAYS:
        row[way] = {"median": median(times[way]), "min": min(times[way]), "max": max(times[way])}
    return row


def _rank(
    rank: int, world_size: int, folder: str, mib: int, rounds: int, speed: float | None
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = _torch.distributed.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    count = 16
    shape = (mib << 20) // count // 4
    state: dict[str, Any] = {f"w{i}": torch.full((shape,), float(i)) for i in range(count)}
    path = f"{folder}/checkpoint"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path))
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            dist.barrier()
            begin = time.perf_counter()
            dcp.load(state, storage_reader=_reader(path, speed), shared_reads=way)
            took = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if number:  # the first one warms up
                times[way].append(took.item())
    if rank == 0:
        with open(f"{folder}/result.json", "w") as file:
            json.dump(times, file)
    dist.barrier()
    dist.destroy_process_group()


def _reader(path: str, speed: float | None) -> ColumnarReader:
    if speed is None:
        return dcp.FileSystemReader(path)
    reader = SlowReader(path)
    reader.bytes_per_second = speed
    return reader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--mib", type=int, default=256, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--slow", type=float, default=200e6, help="bytes/s of the slow medium")
    parser.add_argument("--json", help="write the rows to this file")


def main(options: argparse.Namespace) -> int:
    """Print the table."""
    rows = []
    print(f"{'ranks':>5} {'medium':>12} {'direct s':>9} {'once s':>9} {'direct/once':>12}")
    for speed in (None, options.slow):
        for world_size in options.ranks:
            row = measure(
                world_size, mib=options.mib, rounds=options.rounds, bytes_per_second=speed
            )
            rows.append(row)
            direct, once = row["direct"]["median"], row["once"]["median"]
            medium = "page cache" if speed is None else f"{speed / 1e6:.0f} MB/s"
            print(
                f"{world_size:>5} {medium:>12} {direct:>9.3f} {once:>9.3f} {direct / once:>12.2f}",
                flush=True,
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0
