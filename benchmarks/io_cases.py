"""The cases of one process: whole saves and loads of a model's state and of many small tensors.

Belongs here: setting a case up, running it and giving its numbers. Does not belong here: the ways
to save and load (``io_columns``, ``io_rivals``), several ranks (``io_rank_cases``), tables and
targets (``io``, ``io_targets``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.io_case import Case, Setting, Wanted
from benchmarks.io_columns import Dcp, Ours, Raw, Safetensors, TorchSave, Way, remove
from benchmarks.io_rivals import rivals
from benchmarks.io_small import peak_memory, row_range
from benchmarks.io_state import many_small, model_state, state_bytes, tensors_of
from benchmarks.measure import Column, measure

__all__ = [
    "LOAD_SMALL",
    "LOAD_WARM",
    "PEAK",
    "RANGE",
    "SAVE_DISK",
    "SAVE_FSYNC",
    "SAVE_SMALL",
    "SAVE_TMPFS",
    "UNVERIFIED",
    "one_process",
]

SAVE_FSYNC = "save, 1 process, fsync, disk"
SAVE_DISK = "save, 1 process, no fsync, disk"
SAVE_TMPFS = "save, 1 process, no fsync, tmpfs"
LOAD_WARM = "load in place, warm, 1 process"
RANGE = "1,000 rows of one tensor, opened anew"
PEAK = "peak memory beyond the state"
SAVE_SMALL = "save 20,000 x 1 KiB, tmpfs"
LOAD_SMALL = "load 20,000 x 1 KiB, warm"
UNVERIFIED = "ours, no digests"


def one_process(setting: Setting, wanted: Wanted) -> Iterator[Case]:
    """Cases of this process alone."""
    warnings.simplefilter("ignore")
    if any(map(wanted, (SAVE_FSYNC, SAVE_DISK, SAVE_TMPFS, LOAD_WARM))):
        state = model_state(setting.size)
        if wanted(SAVE_FSYNC):
            yield _saves(SAVE_FSYNC, state, setting, setting.disk, _ways(setting.disk, fsync=True))
        if wanted(SAVE_DISK):
            yield _saves(SAVE_DISK, state, setting, setting.disk, _ways(setting.disk, fsync=False))
        if wanted(SAVE_TMPFS):
            yield _saves(
                SAVE_TMPFS, state, setting, setting.memory, _ways(setting.memory, fsync=False)
            )
        if wanted(LOAD_WARM):
            yield _loads(LOAD_WARM, state, setting, _ways(setting.memory, fsync=False))
        del state
    if any(map(wanted, (SAVE_SMALL, LOAD_SMALL))):
        small = many_small()
        # DCP's best settings change nothing here, and a round of it takes seconds.
        ways = [way for way in _ways(setting.memory, fsync=False) if way.name != "DCP best"]
        if wanted(SAVE_SMALL):
            yield _saves(SAVE_SMALL, small, setting, setting.memory, ways)
        if wanted(LOAD_SMALL):
            yield _loads(LOAD_SMALL, small, setting, ways)
        del small
    if wanted(RANGE):
        yield row_range(RANGE, setting)
    if wanted(PEAK):
        yield peak_memory(PEAK, setting)


def _ways(root: str, *, fsync: bool) -> list[Way]:
    return [
        Ours(fsync=fsync),
        Raw(fsync=fsync),
        Dcp(fsync=fsync),
        Dcp(fsync=fsync, best=True),
        TorchSave(fsync=fsync),
        Safetensors(fsync=fsync),
        *rivals(root),
    ]


def _saves(
    name: str, state: dict[str, Any], setting: Setting, root: str, ways: Sequence[Way]
) -> Case:
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


def _loads(name: str, state: dict[str, Any], setting: Setting, ways: Sequence[Way]) -> Case:
    root = setting.memory
    paths = {way.name: f"{root}/{way.name}" for way in ways}
    for way in ways:
        way.save(state, paths[way.name])
    unverified = Ours(verify=False, name=UNVERIFIED)
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


def _stored(path: str) -> int:
    return sum(
        os.stat(os.path.join(root, name)).st_blocks * 512
        for root, _, names in os.walk(path)
        for name in names
    )


def _bound(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)
