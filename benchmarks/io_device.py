"""Rows of tensors on a GPU: only where there is one.

The floor is the bus: the same tensors copied between the device and pinned memory that is kept.
Belongs here: cases whose state is on a device. Does not belong here: what CPU-only machines run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.io_case import FLOOR, Case, Setting, Wanted
from benchmarks.io_columns import Dcp, Ours, Way, remove
from benchmarks.io_state import model_state, state_bytes, tensors_of
from benchmarks.measure import Column, measure

__all__ = ["LOAD_DEVICE", "SAVE_DEVICE", "device_rows"]

SAVE_DEVICE = "save from the device, no fsync, tmpfs"
LOAD_DEVICE = "load to the device, warm"


def device_rows(setting: Setting, wanted: Wanted) -> Iterator[Case]:
    """Nothing where torch sees no CUDA device."""
    if not torch.cuda.is_available() or not (wanted(SAVE_DEVICE) or wanted(LOAD_DEVICE)):
        return
    state = _on_device(model_state(setting.size))
    tensors = tensors_of(state)
    host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    ways: list[Way] = [Ours(fsync=False), Dcp(fsync=False), Dcp(fsync=False, best=True)]
    paths = {way.name: f"{setting.memory}/device, {way.name}" for way in ways}

    def case(name: str, columns: list[Column], floor: Callable[[], object]) -> Case:
        measured = measure([*columns, Column(name=FLOOR, run=floor)], rounds=setting.rounds)
        return Case(name=name, nbytes=state_bytes(state), tensors=len(tensors), columns=measured)

    if wanted(SAVE_DEVICE):
        columns = [
            Column(
                name=way.name,
                run=_bound(way.save, state, paths[way.name]),
                clean=_bound(remove, paths[way.name]),
            )
            for way in ways
        ]
        yield case(SAVE_DEVICE, columns, lambda: _copy(host, tensors))
    if wanted(LOAD_DEVICE):
        for way in ways:
            way.save(state, paths[way.name])
        columns = [
            Column(name=way.name, run=_synchronized(way.load, state, paths[way.name]))
            for way in ways
        ]
        yield case(LOAD_DEVICE, columns, lambda: _copy(tensors, host))
        for path in paths.values():
            remove(path)


def _on_device(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.cuda()
    if isinstance(state, dict):
        return {key: _on_device(value) for key, value in state.items()}
    return state


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()


def _bound(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _synchronized(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    def run() -> None:
        function(*arguments)
        torch.cuda.synchronize()

    return run
