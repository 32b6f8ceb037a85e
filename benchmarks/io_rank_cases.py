"""The cases of several ranks: saves, cold loads, loads by another number of ranks, bytes read.

Belongs here: setting a case up, running it and giving its numbers. Does not belong here: the
ranks' processes (``io_ranks``), tables and targets (``io``, ``io_targets``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from benchmarks.io_case import FLOOR, Case, Setting, Wanted
from benchmarks.io_columns import default_threads, drop_cache, remove
from benchmarks.io_ranks import Outcome, Ranks
from benchmarks.io_state import WIDTH
from benchmarks.measure import Column, Measured, measure

__all__ = [
    "COLUMNS_OF_2",
    "GRID",
    "READ_RATIO",
    "REPLICAS",
    "ROWS_OF_1",
    "ROWS_OF_4",
    "WIDE_COLUMNS",
    "cold_name",
    "save_name",
    "several_ranks",
]

ROWS_OF_4 = "load resharded, warm, rows of 2 to rows of 4"
ROWS_OF_1 = "load resharded, warm, rows of 4 to 1"
COLUMNS_OF_2 = "load resharded, warm, rows of 2 to columns of 2"
WIDE_COLUMNS = f"load resharded, warm, rows of 2 to columns of 2, {WIDTH:,} wide"
GRID = "load resharded, warm, rows of 2 to 2 x 2"
REPLICAS = "load, warm, rows of 2 to 4 replicas"
READ_RATIO = "bytes read / needed"
"""By the job, of the bytes that it needs, each once."""

SAVED = ("ours", FLOOR, "DCP", "DCP best")
LOADED = ("ours", "ours, no digests", FLOOR, "DCP")
COUNTED = ("ours, once", "ours, once, no digests", "ours, direct", "ours, direct, no digests")


def save_name(world: int) -> str:
    """The case of ``world`` ranks that save."""
    return f"save, {world} ranks, fsync, disk"


def cold_name(world: int) -> str:
    """The case of ``world`` ranks that load what no page cache holds."""
    return f"load in place, cold, {world} ranks, disk"


def several_ranks(setting: Setting, wanted: Wanted) -> Iterator[Case]:
    """Cases of two and of four ranks, and of loads by another number of ranks."""
    for world in (2, 4):
        if not (wanted(save_name(world)) or wanted(cold_name(world))):
            continue
        with Ranks(world, setting.size, threads=1) as ranks:
            paths = {way: f"{setting.disk}/{world} {way}" for way in SAVED}
            if wanted(save_name(world)):
                yield _saves(save_name(world), ranks, setting, paths)
            if wanted(cold_name(world)):
                yield _cold_loads(cold_name(world), ranks, setting, paths)
            for path in paths.values():
                remove(path)
    yield from _resharded_from_2(setting, wanted)
    if wanted(WIDE_COLUMNS):
        saved = _save_rows(2, setting, layout="wide rows")
        with Ranks(2, setting.size, threads=1) as two:
            yield _resharded(WIDE_COLUMNS, "wide columns", two, setting, saved)
        for path in saved.values():
            remove(path)
    if wanted(ROWS_OF_1):
        saved = _save_rows(4, setting)
        with Ranks(1, setting.size, threads=default_threads()) as one:
            yield _resharded(ROWS_OF_1, "rows", one, setting, saved)
        for path in saved.values():
            remove(path)


def _resharded_from_2(setting: Setting, wanted: Wanted) -> Iterator[Case]:
    targets = {ROWS_OF_4: "rows", GRID: "2-D", REPLICAS: "replicated"}
    if not any(map(wanted, (COLUMNS_OF_2, *targets))):
        return
    saved = _save_rows(2, setting)
    if wanted(COLUMNS_OF_2):
        with Ranks(2, setting.size, threads=1) as two:
            yield _resharded(COLUMNS_OF_2, "columns", two, setting, saved)
    if any(map(wanted, targets)):
        with Ranks(4, setting.size, threads=1) as four:
            for name, layout in targets.items():
                if wanted(name):
                    yield _resharded(name, layout, four, setting, saved)
    for path in saved.values():
        remove(path)


def _save_rows(world: int, setting: Setting, *, layout: str = "rows") -> dict[str, str]:
    saved = {way: f"{setting.memory}/rows of {world}, {way}" for way in ("ours", "DCP")}
    with Ranks(world, setting.size, threads=1) as ranks:
        for way, path in saved.items():
            ranks.run(layout, way, "save", path)
    return saved


def _saves(name: str, ranks: Ranks, setting: Setting, paths: dict[str, str]) -> Case:
    outcomes: list[Outcome] = []
    columns = [
        _column(ranks, "rows", way, "save", paths[way], outcomes, clean=True) for way in SAVED
    ]
    return _case(name, measure(columns, rounds=setting.rounds), outcomes)


def _cold_loads(name: str, ranks: Ranks, setting: Setting, paths: dict[str, str]) -> Case:
    outcomes: list[Outcome] = []
    for way, path in paths.items():
        ranks.run("rows", way, "save", path)
    columns = [
        _column(ranks, "rows", way, "load", paths[way], outcomes, cold=True) for way in SAVED
    ]
    return _case(name, measure(columns, rounds=setting.rounds), outcomes)


def _resharded(
    name: str, layout: str, ranks: Ranks, setting: Setting, saved: dict[str, str]
) -> Case:
    """The floor reads as many bytes as each rank needs, in one piece, from a file of its own."""
    floor = f"{setting.memory}/floor"
    ranks.run(layout, FLOOR, "save", floor)
    paths = {**saved, "ours, no digests": saved["ours"], FLOOR: floor}
    outcomes: list[Outcome] = []
    columns = [_column(ranks, layout, way, "load", paths[way], outcomes) for way in LOADED]
    measured = measure(columns, rounds=setting.rounds)
    case = _case(name, measured, outcomes)
    # Replicas need one copy among them.
    needed = case.nbytes / (ranks.world_size if layout == "replicated" else 1)
    counts = {}
    for way in (*COUNTED, "DCP"):
        path = paths.get(way, saved["ours"])
        last = ranks.run(layout, way, "load", path)
        counts[way] = {READ_RATIO: last.bytes_read / needed}
    remove(floor)
    return replace(case, counts=counts)


def _column(
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


def _case(name: str, measured: dict[str, Measured], outcomes: Sequence[Outcome]) -> Case:
    return Case(name=name, nbytes=outcomes[-1].needed, tensors=0, columns=measured)


def _bound(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)
