"""Asynchronous saves: how long training waits, and how much it is slowed.

Ours by thread and by process against torch's DCP (a new stager for each save, which is its
default, and a kept one), a plain ``copy_`` and a raw write, interleaved in the same processes.
Belongs here: ranks as processes, tables and targets. Does not belong here: the rows
(``async_rows``).
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.async_rows import measure_rank
from benchmarks.report import Target, machine, markdown_table, number, write_json

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m benchmarks async``."""
    parser.add_argument("--size", type=int, default=1024, help="MiB of state of all ranks (1024)")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (15)")
    parser.add_argument("--saves", type=int, default=100, help="saves for the memory row (100)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="(1 2)")
    parser.add_argument("--quick", action="store_true", help="64 MiB, 3 rounds, 20 saves")
    parser.add_argument("--disk", default=None, help="a directory on a disk (a temporary one)")
    parser.add_argument("--json", default="async.json", help="where to write all numbers")


def main(options: argparse.Namespace) -> int:
    """Measure, print, write; 1 if a target is missed."""
    size, rounds, saves = options.size, options.rounds, options.saves
    if options.quick:
        size, rounds, saves = 64, 3, 20
    about = machine()
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    content: dict[str, Any] = {"machine": about, "size": size << 20, "rounds": rounds}
    missed = False
    for world_size in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.disk) as disk:
            found = _run(world_size, disk, (size << 20) // world_size, rounds, saves)
        worst = _worst(found)
        content[f"{world_size} ranks"] = found
        print(f"\n### {size} MiB, {world_size} rank{'s' if world_size > 1 else ''}\n")
        print(_table(worst["steady"]), "\n", flush=True)
        for target in _targets(worst):
            missed = missed or not target.passed
            print(target.line(), flush=True)
        lost = worst["training lost"]
        for way, share in worst["training"].items():
            print(
                f"training beside {way}: {share:.2f} of its speed alone while the save is in "
                f"flight, {1000 * lost[way]:.0f} ms lost a save"
            )
        first = worst["steady"]["first save"]["DCP, process, kept stager"]
        print(f"DCP, first save by a process: {first:.2f} s")
    write_json(options.json, content)
    print(f"\nall numbers: {options.json}")
    return int(missed)


def _worst(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest rank's figures: the larger of each, of shares of speed the smaller."""
    result: dict[str, Any] = {}
    for part in ("steady", "first", "memory", "training lost"):
        result[part] = _merged([rank[part] for rank in found], max)
    result["training"] = _merged([rank["training"] for rank in found], min)
    return result


def _merged(values: list[Any], choose: Any) -> Any:
    if isinstance(values[0], dict):
        return {key: _merged([v[key] for v in values], choose) for key in values[0]}
    return choose(values)


def _table(steady: dict[str, dict[str, float]]) -> str:
    rows = [
        [
            name,
            number(1000 * row["blocked"]),
            f"{row['to plain copy_']:.2f}",
            number(row["committed"]),
            f"{row['to raw write']:.2f}",
        ]
        for name, row in steady.items()
        if "blocked" in row
    ]
    columns = ["", "blocked, ms", "of copy_", "until committed, s", "of raw write"]
    return markdown_table(columns, rows)


def _targets(found: dict[str, Any]) -> list[Target]:
    steady, first, memory, training, lost = (
        found[part] for part in ("steady", "first", "memory", "training", "training lost")
    )
    targets = []
    for kind in ("thread", "process"):
        own = steady[f"ours, {kind}"]
        targets += [
            _at_most(f"{kind}: blocked, of a plain copy_", own["to plain copy_"], 1.2),
            _at_most(f"{kind}: until committed, of raw write", own["to raw write"], 1.2),
            _at_most(
                f"{kind}: blocked with background staging",
                1000 * steady[f"ours, {kind}, background staging"]["blocked"],
                20.0,
                "ms",
            ),
            _at_most(
                f"{kind}: slowdown of training while a save is in flight, of DCP's",
                _slowdown(training[f"ours, {kind}"])
                / _slowdown(training[f"DCP, {kind}, kept stager"]),
                1.0,
            ),
            _at_most(
                f"{kind}: training time lost by a save, of DCP's",
                max(lost[f"ours, {kind}"], 0.001) / max(lost[f"DCP, {kind}, kept stager"], 0.001),
                1.0,
            ),
        ]
    targets += [
        _at_most(
            "first call, of the first touch of shared memory",
            first["first call"] / first["first touch"],
            1.2,
        ),
        _at_most(
            "first call after warmup, of a later call",
            first["first call after warmup"] / first["later call"],
            1.3,
        ),
        _at_most("arena, of the state", memory["arena after all"] / memory["state"], 1.1),
        _at_most(
            f"memory after {memory['saves']:.0f} saves, of that after ten",
            memory["bytes after all"] / memory["bytes after ten"],
            1.05,
        ),
        _at_most(
            "descriptors more than after ten saves",
            memory["descriptors after all"] - memory["descriptors after ten"],
            0,
        ),
        _at_most(
            "bytes over the pipe for a later save",
            steady["bytes sent"]["second save"],
            4096,
            "bytes",
        ),
    ]
    return targets


def _slowdown(share: float) -> float:
    """Seconds more for each second of training, at least a hundredth: less cannot be told."""
    return max(1 / share - 1, 0.01)


def _at_most(text: str, measured: float, limit: float, unit: str = "") -> Target:
    return Target(text=text, measured=measured, limit=limit, unit=unit)


def _run(world_size: int, disk: str, nbytes: int, rounds: int, saves: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world_size):
        here, there = context.Pipe()
        process = context.Process(
            target=_serve, args=(rank, world_size, disk, nbytes, rounds, saves, there)
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        raise RuntimeError("a rank ended early; what it said is above") from None
    finally:
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()


def _serve(
    rank: int,
    world_size: int,
    disk: str,
    nbytes: int,
    rounds: int,
    saves: int,
    pipe: Connection,
) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    store_file = f"{disk}/port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        with open(f"{store_file}.new", "w") as file:
            file.write(str(store.port))
        os.rename(f"{store_file}.new", store_file)
    else:
        while not os.path.exists(store_file):
            pass
        with open(store_file) as file:
            store = dist.TCPStore("127.0.0.1", int(file.read()), None, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    # DCP's process looks for the trainer's store there.
    os.environ["MASTER_PORT"] = str(store.port)
    pipe.send(measure_rank(disk, nbytes, rounds, saves))
    dist.barrier()
    dist.destroy_process_group()
