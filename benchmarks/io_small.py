"""What is counted rather than raced: one row range, peak memory.

Belongs here: cases without a rival's column of times. Does not belong here: whole saves and loads
(``io_cases``).
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import dcp_engine
from benchmarks.io_case import Case, Setting
from benchmarks.io_columns import Dcp, Ours, Way, remove
from benchmarks.io_state import model_state
from benchmarks.measure import Column, measure

__all__ = ["peak_memory", "row_range"]

ROWS = 1000
COLUMNS = 1024


def row_range(name: str, setting: Setting) -> Case:
    """Some rows of one tensor, the checkpoint opened anew each time; then, for the bytes, other
    rows of the checkpoint that is open, whose manifest and headers are known."""
    path = f"{setting.memory}/range"
    rows = max(4096, setting.size // 4 // COLUMNS // 2)
    state = {"weight": torch.full((rows, COLUMNS), 1.0), "rest": torch.full((rows * 512,), 2.0)}
    Ours(fsync=False).save(state, path)

    def one_range() -> None:
        with dcp_engine.open(path) as checkpoint:
            _tensor(checkpoint)[ROWS : 2 * ROWS]

    measured = measure([Column(name="ours", run=one_range)], rounds=setting.rounds)
    wanted = ROWS * COLUMNS * 4
    with dcp_engine.open(path) as checkpoint:
        first = _bytes_read(lambda: _tensor(checkpoint)[ROWS : 2 * ROWS])
        # Both ends inside a block.
        second = _bytes_read(lambda: _tensor(checkpoint)[2 * ROWS + 9 : 3 * ROWS + 9])
    remove(path)
    return Case(
        name=name,
        nbytes=wanted,
        tensors=1,
        columns=measured,
        counts={
            "ours": {
                "bytes beyond the range": second - wanted,
                "with headers and digests": first - wanted,
            }
        },
    )


def _tensor(checkpoint: dcp_engine.Checkpoint) -> dcp_engine.LazyTensor:
    handle = checkpoint["weight"]
    if not isinstance(handle, dcp_engine.LazyTensor):
        raise TypeError(f"{type(handle).__name__} instead of a tensor")
    return handle


def peak_memory(name: str, setting: Setting) -> Case:
    """Resident memory at its peak, beyond what there was before, each time in a new process."""
    counts: dict[str, dict[str, float]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for way in ("ours", "DCP"):
            for action in ("save", "load"):
                peak = pool.submit(_peak, way, action, setting.size, setting.disk).result()
                counts.setdefault(way, {})[f"{action}, peak MiB"] = peak / 2**20
    return Case(name=name, nbytes=setting.size, tensors=0, counts=counts)


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


def _bytes_read(action: Callable[[], object]) -> int:
    """By the kernel's count, without what the look at that count reads."""
    first = _read_so_far()
    before = _read_so_far()
    action()
    return _read_so_far() - before - (before - first)


def _read_so_far() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])
