"""The cases of the I/O benchmark: what is saved and loaded, by whom, and against what.

Belongs here: setting a case up, running it and giving its numbers. Does not belong here: the ways
to save and load (``io_columns``), processes (``io_ranks``), tables and targets (``io``).
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dcp_engine
from benchmarks.io_columns import (
    Dcp,
    Ours,
    Raw,
    Safetensors,
    TorchSave,
    Way,
    default_threads,
    drop_cache,
    remove,
)
from benchmarks.io_ranks import Outcome, Ranks
from benchmarks.io_state import many_small, model_state, state_bytes, tensors_of
from benchmarks.measure import Column, Measured, measure

__all__ = ["Case", "one_process", "several_ranks"]

FLOOR = "raw floor"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case's numbers."""

    name: str
    nbytes: int
    tensors: int
    columns: dict[str, Measured]
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    """By column, what was counted instead of timed."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases share."""

    size: int
    rounds: int
    disk: str
    """A directory on a disk."""
    memory: str
    """A directory on tmpfs."""


def one_process(setting: Setting) -> Iterator[Case]:
    """Cases of this process alone."""
    warnings.simplefilter("ignore")
    state = model_state(setting.size)
    yield _saves("save, 1 process, fsync, disk", state, setting, setting.disk, fsync=True)
    yield _saves("save, 1 process, no fsync, disk", state, setting, setting.disk, fsync=False)
    yield _saves("save, 1 process, no fsync, tmpfs", state, setting, setting.memory, fsync=False)
    yield _loads("load in place, warm, 1 process", state, setting)
    yield _row_range(setting)
    yield _peak_memory(setting)
    del state
    small = many_small()
    yield _saves("save 20,000 x 1 KiB, tmpfs", small, setting, setting.memory, fsync=False)
    yield _loads("load 20,000 x 1 KiB, warm", small, setting)


def _ways(*, fsync: bool) -> list[Way]:
    return [
        Ours(fsync=fsync),
        Raw(fsync=fsync),
        Dcp(fsync=fsync),
        Dcp(fsync=fsync, best=True),
        TorchSave(fsync=fsync),
        Safetensors(fsync=fsync),
    ]


def _saves(name: str, state: dict[str, Any], setting: Setting, root: str, *, fsync: bool) -> Case:
    ways = _ways(fsync=fsync)
    columns = [
        Column(
            name=way.name,
            run=_bound(way.save, state, f"{root}/{way.name}"),
            clean=_bound(remove, f"{root}/{way.name}"),
        )
        for way in ways
    ]
    measured = measure(columns, rounds=setting.rounds)
    counts = {}
    for way in ways:
        path = f"{root}/{way.name}"
        way.save(state, path)
        counts[way.name] = {"bytes on disk / payload": _stored(path) / state_bytes(state)}
        remove(path)
    return Case(
        name=name,
        nbytes=state_bytes(state),
        tensors=len(tensors_of(state)),
        columns=measured,
        counts=counts,
    )


def _loads(name: str, state: dict[str, Any], setting: Setting) -> Case:
    root = setting.memory
    ways = _ways(fsync=False)
    paths = {way.name: f"{root}/{way.name}" for way in ways}
    for way in ways:
        way.save(state, paths[way.name])
    unverified = Ours(verify=False, name="ours, no digests")
    paths[unverified.name] = paths["ours"]
    columns = [
        Column(name=way.name, run=_bound(way.load, state, paths[way.name]))
        for way in [*ways, unverified]
    ]
    measured = measure(columns, rounds=setting.rounds)
    for path in paths.values():
        remove(path)
    return Case(
        name=name, nbytes=state_bytes(state), tensors=len(tensors_of(state)), columns=measured
    )


def _row_range(setting: Setting) -> Case:
    """One row range of one tensor, the checkpoint opened anew each time."""
    path = f"{setting.memory}/range"
    rows = max(4096, setting.size // 4 // 4096)
    state = {"weight": torch.full((rows, 1024), 1.0), "rest": torch.full((rows * 256,), 2.0)}
    Ours(fsync=False).save(state, path)
    read: list[int] = []

    def one_range() -> None:
        before = _read_so_far()
        with dcp_engine.Checkpoint(dcp_engine.FileSystemReader(path), path) as checkpoint:
            handle = checkpoint["weight"]
            if isinstance(handle, dcp_engine.LazyTensor):
                handle[1000:2000]
        read.append(_read_so_far() - before)

    measured = measure([Column(name="ours", run=one_range)], rounds=setting.rounds)
    remove(path)
    wanted = 1000 * 1024 * 4
    return Case(
        name="1,000 rows of one tensor, opened anew",
        nbytes=wanted,
        tensors=1,
        columns=measured,
        counts={"ours": {"bytes read beyond the range": read[-1] - wanted}},
    )


def _peak_memory(setting: Setting) -> Case:
    """Resident memory at its peak, beyond what there was before, each time in a new process."""
    counts: dict[str, dict[str, float]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in ("ours", "DCP"):
            for action in ("save", "load"):
                peak = pool.submit(_peak, name, action, setting.size, setting.disk).result()
                counts.setdefault(name, {})[f"{action}, peak MiB"] = peak / 2**20
    return Case(
        name="peak memory beyond the state",
        nbytes=setting.size,
        tensors=0,
        columns={},
        counts=counts,
    )


def _peak(name: str, action: str, size: int, root: str) -> int:
    """In a process of its own: bytes."""
    warnings.simplefilter("ignore")
    way: Way = Ours() if name == "ours" else Dcp()
    tiny, path = model_state(1 << 20), f"{root}/peak"
    for first in (way.save, way.load):  # what libraries load at the first call does not count
        first(tiny, path)
    remove(path)
    state = model_state(size)
    if action == "load":
        way.save(state, path)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    getattr(way, action)(state, path)
    peak = _status("VmHWM")
    remove(path)
    return max(0, peak - before)


def _status(field_name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field_name)).split()[1]) * 1024


def _read_so_far() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def _stored(path: str) -> int:
    return sum(
        os.stat(os.path.join(root, name)).st_blocks * 512
        for root, _, names in os.walk(path)
        for name in names
    )


def _bound(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


MULTI = ("ours", FLOOR, "DCP", "DCP best")
RESHARDED = ("ours", "ours, no digests", FLOOR, "DCP")


def several_ranks(setting: Setting) -> Iterator[Case]:
    """Cases of two and of four ranks, and of loads by another number of ranks."""
    for world in (2, 4):
        with Ranks(world, setting.size, threads=1) as ranks:
            paths = {way: f"{setting.disk}/{world} {way}" for way in MULTI}
            yield _ranks_save(world, ranks, setting, paths)
            yield _ranks_load_cold(world, ranks, setting, paths)
            for path in paths.values():
                remove(path)
    saved = {way: f"{setting.memory}/rows of 2, {way}" for way in ("ours", "DCP")}
    with Ranks(2, setting.size, threads=1) as two:
        for way, path in saved.items():
            two.run("rows", way, "save", path)
        name = "load resharded, rows of 2 to columns of 2"
        yield _resharded(name, "columns", two, setting, saved)
    with Ranks(4, setting.size, threads=1) as four:
        yield _resharded("load resharded, rows of 2 to rows of 4", "rows", four, setting, saved)
        yield _resharded("load resharded, rows of 2 to 2 x 2", "2-D", four, setting, saved)
        yield _resharded("load, rows of 2 to 4 replicas", "replicated", four, setting, saved)
        saved4 = {way: f"{setting.memory}/rows of 4, {way}" for way in ("ours", "DCP")}
        for way, path in saved4.items():
            four.run("rows", way, "save", path)
    for path in saved.values():
        remove(path)
    with Ranks(1, setting.size, threads=default_threads()) as one:
        yield _resharded("load resharded, rows of 4 to 1", "rows", one, setting, saved4)
    for path in saved4.values():
        remove(path)


def _ranks_save(world: int, ranks: Ranks, setting: Setting, paths: dict[str, str]) -> Case:
    outcomes: list[Outcome] = []
    columns = [
        _ranks_column(ranks, "rows", way, "save", paths[way], outcomes, clean=True) for way in MULTI
    ]
    measured = measure(columns, rounds=setting.rounds)
    return _ranks_case(f"save, {world} ranks, fsync, disk", measured, outcomes)


def _ranks_load_cold(world: int, ranks: Ranks, setting: Setting, paths: dict[str, str]) -> Case:
    outcomes: list[Outcome] = []
    for way, path in paths.items():
        ranks.run("rows", way, "save", path)
    columns = [
        _ranks_column(ranks, "rows", way, "load", paths[way], outcomes, cold=True) for way in MULTI
    ]
    measured = measure(columns, rounds=setting.rounds)
    return _ranks_case(f"load in place, cold, {world} ranks, disk", measured, outcomes)


def _resharded(
    name: str, layout: str, ranks: Ranks, setting: Setting, saved: dict[str, str]
) -> Case:
    """The floor reads as many bytes as each rank needs, in one piece, from a file of its own."""
    floor = f"{setting.memory}/floor"
    ranks.run(layout, FLOOR, "save", floor)
    paths = {**saved, "ours, no digests": saved["ours"], FLOOR: floor}
    counts: dict[str, dict[str, float]] = {}
    outcomes: list[Outcome] = []
    columns = []
    for way in RESHARDED:
        seen: list[Outcome] = []
        columns.append(_ranks_column(ranks, layout, way, "load", paths[way], seen))
        outcomes = seen
        counts[way] = {}
    measured = measure(columns, rounds=setting.rounds)
    for way in RESHARDED:
        last = ranks.run(layout, way, "load", paths[way])
        counts[way] = {"bytes read / needed": last.bytes_read / last.needed}
    remove(floor)
    case = _ranks_case(name, measured, outcomes)
    return Case(**{**vars(case), "counts": counts})


def _ranks_column(
    ranks: Ranks,
    layout: str,
    way: str,
    action: str,
    path: str,
    outcomes: list[Outcome],
    *,
    clean: bool = False,
    cold: bool = False,
) -> Column:
    def clock(run: Callable[[], object]) -> tuple[float, float]:
        outcome = ranks.run(layout, way, action, path)
        outcomes.append(outcome)
        return outcome.wall, outcome.processor

    return Column(
        name=way,
        run=lambda: None,
        prepare=_bound(drop_cache, path) if cold else lambda: None,
        clean=_bound(remove, path) if clean else lambda: None,
        clock=clock,
    )


def _ranks_case(name: str, measured: dict[str, Measured], outcomes: Sequence[Outcome]) -> Case:
    return Case(name=name, nbytes=outcomes[-1].needed, tensors=0, columns=measured)
