"""What one rank measures for ``python -m benchmarks async``, in a process of its own.

Belongs here: the rows. Does not belong here: ranks as processes, tables (``async_saves``).
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.async_ways import AsyncWay, DcpAsync, OursAsync
from benchmarks.io_columns import Raw, default_threads, remove
from benchmarks.io_ranks import sharded_state
from benchmarks.io_state import model_state, state_bytes, tensors_of
from benchmarks.measure import in_drawn_order

__all__ = ["measure_rank"]

_FIRST_CALLS = 5
"""Engines whose first calls are measured."""


def measure_rank(disk: str, nbytes: int, rounds: int, saves: int) -> dict[str, Any]:
    """All rows, as medians over the rounds. Seconds and bytes.

    Args:
        nbytes: of the state on this rank.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        state = model_state(nbytes)
    else:
        state = sharded_state("rows", nbytes * world_size, world_size)
    tensors = tensors_of(state)
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    result: dict[str, Any] = {"bytes": state_bytes(state)}
    result["steady"] = _steady(state, tensors, copies, disk, rounds)
    result["training"], result["training lost"] = _training(state, disk, max(3, rounds))
    result["memory"] = _memory(disk, saves)
    # Last, since they free what the host then takes back.
    result["first"] = _first_calls(state, disk)
    return result


def _first_calls(state: dict[str, Any], disk: str) -> dict[str, float]:
    """The first call of an engine: without and with ``warmup``, against the first touch of as much
    shared memory, each time with another engine: what the host of a virtual machine takes to grant
    memory differs from one time to the next by more than what is measured."""
    touches, calls, warm_calls, later = [], [], [], []
    for _ in range(_FIRST_CALLS):
        touches.append(_first_touch(state_bytes(state)))
        calls.append(_begin_first(state, disk, warm=False)[0])
        warm_call, after = _begin_first(state, disk, warm=True)
        warm_calls.append(warm_call)
        later += after
    return {
        "first touch": statistics.median(touches),
        "first call": statistics.median(calls),
        "first call after warmup": statistics.median(warm_calls),
        "later call": statistics.median(later),
    }


def _begin_first(state: dict[str, Any], disk: str, *, warm: bool) -> tuple[float, list[float]]:
    """Seconds of the first call of a new engine, and of later ones."""
    way = OursAsync("process")
    if warm:
        way.engine.warmup(state)
    dist.barrier()
    first, response = _blocked(way, state, f"{disk}/first")
    response.result()
    later = []
    for _ in range(3 if warm else 0):
        dist.barrier()
        seconds, response = _blocked(way, state, f"{disk}/first")
        response.result()
        later.append(seconds)
    dist.barrier()
    way.close()
    return first, later


def _first_touch(nbytes: int) -> float:
    """Seconds for a thread per processor to write every page of a new memfd."""
    descriptor = os.memfd_create("touch")
    os.ftruncate(descriptor, nbytes)
    memory = mmap.mmap(descriptor, nbytes)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    parts = whole.split(16 << 20)
    dist.barrier()
    begin = time.perf_counter()
    with ThreadPoolExecutor(default_threads()) as pool:
        list(pool.map(lambda part: part.fill_(1), parts))
    seconds = time.perf_counter() - begin
    del whole, parts
    os.close(descriptor)
    return seconds


def _steady(
    state: dict[str, Any],
    tensors: list[torch.Tensor],
    copies: list[torch.Tensor],
    disk: str,
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Per way: seconds the caller is blocked, and until it is committed; interleaved."""
    ways: list[AsyncWay] = [
        OursAsync("thread"),
        OursAsync("process"),
        OursAsync("thread", background=True),
        OursAsync("process", background=True),
        DcpAsync("thread", kept=False),
        DcpAsync("thread", kept=True),
        DcpAsync("process", kept=False),
        DcpAsync("process", kept=True),
    ]
    raw = Raw()
    rank = dist.get_rank()

    def copy_plainly() -> tuple[float, float]:
        begin = time.perf_counter()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)
        seconds = time.perf_counter() - begin
        return seconds, seconds

    def write_raw() -> tuple[float, float]:
        begin = time.perf_counter()
        raw.save(state, f"{disk}/raw{rank}")
        seconds = time.perf_counter() - begin
        remove(f"{disk}/raw{rank}")
        return seconds, seconds

    def save(way: AsyncWay) -> tuple[float, float]:
        path = f"{disk}/{way.name.replace(' ', '').replace(',', '-')}"
        begin = time.perf_counter()
        block, response = _blocked(way, state, path)
        response.result()
        total = time.perf_counter() - begin
        dist.barrier()
        if rank == 0:
            remove(path)
        return block, total

    rows: dict[str, Callable[[], tuple[float, float]]] = {
        "plain copy_": copy_plainly,
        "raw write and fsync": write_raw,
        **{way.name: partial(save, way) for way in ways},
    }
    blocked: dict[str, list[float]] = {name: [] for name in rows}
    whole: dict[str, list[float]] = {name: [] for name in rows}
    to_copy: dict[str, list[float]] = {name: [] for name in rows}
    # What is kept between saves comes first, before anything is freed: memory that the host of a
    # virtual machine has taken back and grants again is slower to copy to from then on.
    first = {way.name: save(way)[1] for way in ways if way.kept}
    for number in range(-2, rounds):
        for name in in_drawn_order(rows, number):
            # A copy after something else takes half as long again: all come after one, and are
            # compared with one right before them. The two processors of a virtual machine are at
            # times two threads of one core, and copy half as fast then as when they are two cores.
            for _ in range(2):
                dist.barrier()
                before, _ = copy_plainly()
            dist.barrier()
            block, total = rows[name]()
            if number >= 0:
                blocked[name].append(block)
                whole[name].append(total)
                to_copy[name].append(block / before)
    sent = 0
    for way in ways:
        if isinstance(way, OursAsync) and way.engine._async is not None:
            sent = max(sent, way.engine._async.bytes_sent)
        dist.barrier()
        way.close()
    return {
        **{
            name: {
                "blocked": statistics.median(blocked[name]),
                "to plain copy_": statistics.median(to_copy[name]),
                "committed": statistics.median(whole[name]),
                "to raw write": statistics.median(
                    w / r for w, r in zip(whole[name], whole["raw write and fsync"], strict=True)
                ),
            }
            for name in blocked
        },
        "bytes sent": {"second save": float(sent)},
        "first save": first,
    }


def _blocked(way: AsyncWay, state: dict[str, Any], path: str) -> tuple[float, Future[Any]]:
    begin = time.perf_counter()
    response = way.begin(state, path)
    return time.perf_counter() - begin, response


def _training(
    state: dict[str, Any], disk: str, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Per way: iterations of a training loop a second while a save is in flight, as a share of
    those without one; and seconds of training that are lost by that, since a save that takes less
    time may be dearer while it lasts."""
    ways: list[AsyncWay] = [
        OursAsync("thread"),
        OursAsync("process"),
        DcpAsync("thread", kept=True),
        DcpAsync("process", kept=True),
    ]
    step = _training_step()
    shares: dict[str, list[float]] = {way.name: [] for way in ways}
    lost: dict[str, list[float]] = {way.name: [] for way in ways}
    rank = dist.get_rank()
    for number in range(-1, rounds):
        for way in in_drawn_order(ways, number):
            alone = _rate(step, lambda begin: time.perf_counter() - begin > 0.5)
            dist.barrier()
            path = f"{disk}/training"
            response = way.begin(state, path)
            begin = time.perf_counter()
            beside = _rate(step, lambda _, r=response: r.done())  # type: ignore[misc]
            seconds = time.perf_counter() - begin
            response.result()
            dist.barrier()
            if rank == 0:
                remove(path)
            dist.barrier()
            if number >= 0:
                shares[way.name].append(beside / alone)
                lost[way.name].append((1 - beside / alone) * seconds)
    for way in ways:
        dist.barrier()
        way.close()
    return _medians(shares), _medians(lost)


def _medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in values.items()}


def _training_step() -> Callable[[], None]:
    """Matrix products, and Python work of about the same time."""
    left, right = torch.randn(384, 384), torch.randn(384, 384)

    def step() -> None:
        (left @ right).relu_().sum()
        table: dict[int, int] = {}
        for i in range(4000):
            table[i % 97] = table.get(i % 97, 0) + i

    return step


def _rate(step: Callable[[], None], over: Callable[[float], bool]) -> float:
    begin = time.perf_counter()
    count = 0
    while count < 3 or not over(begin):
        step()
        count += 1
    return count / (time.perf_counter() - begin)


def _memory(disk: str, saves: int) -> dict[str, float]:
    """Bytes that this process and its worker have (shared ones by halves), and descriptors, after
    ten saves and after all; and bytes of the arena."""
    state = {f"w{i}": torch.full((256, 1024), float(i)) for i in range(64)}
    path = f"{disk}/memory"
    way = OursAsync("process")
    found: dict[str, float] = {"state": float(state_bytes(state)), "saves": float(saves)}
    for number in range(saves):
        way.begin(state, path).result()
        if number == min(9, saves - 1):
            found.update({f"{name} after ten": v for name, v in _present(way).items()})
    found.update({f"{name} after all": v for name, v in _present(way).items()})
    dist.barrier()
    way.close()
    return found


def _present(way: OursAsync) -> dict[str, float]:
    saver, pid = way.engine._async, way.engine.worker_pid
    assert saver is not None
    assert pid is not None
    return {
        "bytes": _proportional_bytes(os.getpid()) + _proportional_bytes(pid),
        "descriptors": float(len(os.listdir("/proc/self/fd")) + len(os.listdir(f"/proc/{pid}/fd"))),
        "arena": float(saver._stager.arenas.present()),
    }


def _proportional_bytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return float(line.split()[1]) * 1024
    return 0.0
