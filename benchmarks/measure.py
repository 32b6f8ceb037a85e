"""Interleaved measurement: every column once a round, medians over the rounds.

Belongs here: the clock, the rounds and the statistics. Does not belong here: what is measured.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Column", "Figure", "Measured", "in_drawn_order", "measure", "ratio"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One contender. ``prepare`` and ``clean`` run before and after every round, untimed."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    clean: Callable[[], object] = lambda: None
    clock: Callable[[Callable[[], object]], tuple[float, float]] | None = None
    """Runs the callable and returns wall and processor seconds; by default of this process."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Seconds over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One column's result: every round's seconds, and their statistics."""

    wall: Figure
    processor: Figure
    wall_rounds: tuple[float, ...]
    processor_rounds: tuple[float, ...]


def _figure(values: Sequence[float]) -> Figure:
    return Figure(median=statistics.median(values), low=min(values), high=max(values))


def in_drawn_order(items: Iterable[T], number: int) -> list[T]:
    """``items`` as they come in round ``number``: drawn, the same on all ranks and in every run.

    Were the order rotated, each would always come after the same other one, and find what that
    one leaves behind.
    """
    found = list(items)
    return random.Random(number).sample(found, len(found))


def own_clock(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds (all threads) of this process."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(columns: Sequence[Column], *, rounds: int, warm_up: int = 1) -> dict[str, Measured]:
    """Run every column ``warm_up + rounds`` times, in turn, in another order each round."""
    walls: dict[str, list[float]] = {column.name: [] for column in columns}
    processors: dict[str, list[float]] = {column.name: [] for column in columns}
    for number in range(-warm_up, rounds):
        for column in in_drawn_order(columns, number):
            column.prepare()
            gc.collect()
            wall, processor = (column.clock or own_clock)(column.run)
            column.clean()
            if number >= 0:
                walls[column.name].append(wall)
                processors[column.name].append(processor)
    return {
        name: Measured(
            wall=_figure(walls[name]),
            processor=_figure(processors[name]),
            wall_rounds=tuple(walls[name]),
            processor_rounds=tuple(processors[name]),
        )
        for name in walls
    }


def ratio(measured: Mapping[str, Measured], name: str, floor: str) -> float:
    """Median of the rounds' quotients floor / ``name``: the share of the floor's speed."""
    pairs = zip(measured[floor].wall_rounds, measured[name].wall_rounds, strict=True)
    return statistics.median(f / own for f, own in pairs)


def processor_ratio(measured: Mapping[str, Measured], name: str, floor: str) -> float:
    """Median of the rounds' quotients ``name`` / floor of processor time."""
    pairs = zip(measured[floor].processor_rounds, measured[name].processor_rounds, strict=True)
    return statistics.median(own / max(f, 1e-9) for f, own in pairs)
