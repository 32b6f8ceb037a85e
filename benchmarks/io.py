"""Saves and loads against the raw floor, torch's DCP, torch.save, safetensors and others.

All columns of a case run interleaved in one process (or in one set of ranks), with memory kept
and reused, after a warm-up; medians, spread, wall and processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.io_case import FLOOR, Case, Setting
from benchmarks.io_cases import one_process
from benchmarks.io_device import device_rows
from benchmarks.io_plot import bar_chart
from benchmarks.io_rank_cases import several_ranks
from benchmarks.io_rivals import missing_rivals
from benchmarks.io_targets import io_targets
from benchmarks.measure import processor_ratio, ratio
from benchmarks.report import machine, markdown_table, number, write_json

__all__ = ["add_arguments", "main"]

COLUMNS = ("way", "wall ms", "low", "high", "GB/s", "of floor", "CPU ms", "CPU / floor", "counted")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--size", type=int, default=768, help="MiB of state (768)")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (15)")
    parser.add_argument("--quick", action="store_true", help="64 MiB, 3 rounds")
    parser.add_argument("--only", choices=("one", "ranks"), help="one process, or several ranks")
    parser.add_argument("--case", default="", help="only cases whose names hold this")
    parser.add_argument("--disk", default=None, help="a directory on a disk (a temporary one)")
    parser.add_argument("--json", default="io.json", help="where to write all numbers")
    parser.add_argument("--plots", default=None, help="a directory for one SVG a case")


def main(options: argparse.Namespace) -> int:
    """Run, print and write the results."""
    size, rounds = (64, 3) if options.quick else (options.size, options.rounds)
    about = machine()
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    absent = missing_rivals()
    if not torch.cuda.is_available():
        absent["rows of a device"] = "torch sees no CUDA device"
    for what, why in absent.items():
        print(f"not measured: {what}: {why}")
    print(f"state: {size} MiB, {rounds} rounds\n")
    cases: list[Case] = []
    with (
        tempfile.TemporaryDirectory(dir=options.disk) as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        setting = Setting(size=size << 20, rounds=rounds, disk=disk, memory=memory)
        for case in _cases(options, setting):
            cases.append(case)
            print(f"### {case.name}\n\n{_table(case)}\n", flush=True)
            # After each case, so that a run that is broken off has told something.
            about["load average at the end"] = machine()["load average at the start"]
            content = {"machine": about, "not measured": absent, "size": size << 20}
            _write(options.json, {**content, "rounds": rounds}, cases)
    print(f"load average at the end: {about.get('load average at the end', '')}\n")
    print("### Targets\n\n" + "\n".join(target.line() for target in io_targets(cases)))
    if options.plots:
        _plot(cases, Path(options.plots))
    return 0


def _write(path: str, about: Mapping[str, Any], cases: Sequence[Case]) -> None:
    content = {
        **about,
        "cases": [dataclasses.asdict(case) for case in cases],
        "targets": [dataclasses.asdict(target) for target in io_targets(cases)],
    }
    write_json(path, content)


def _cases(options: argparse.Namespace, setting: Setting) -> Iterable[Case]:
    def wanted(name: str) -> bool:
        return options.case in name

    if options.only != "ranks":
        yield from one_process(setting, wanted)
        yield from device_rows(setting, wanted)
    if options.only != "one":
        yield from several_ranks(setting, wanted)


def _table(case: Case) -> str:
    names = [*case.columns, *(name for name in case.counts if name not in case.columns)]
    rows = [_row(case, name) for name in names]
    # Columns that nothing is in say nothing.
    kept = [at for at in range(len(COLUMNS)) if any(row[at] for row in rows)]
    return markdown_table(_at(COLUMNS, kept), [_at(row, kept) for row in rows])


def _at(cells: Sequence[str], kept: Sequence[int]) -> list[str]:
    return [cells[at] for at in kept]


def _row(case: Case, name: str) -> list[str]:
    counted = "; ".join(f"{k} {number(v)}" for k, v in case.counts.get(name, {}).items())
    measured = case.columns.get(name)
    if measured is None:
        return [name, *[""] * (len(COLUMNS) - 2), counted]
    if case.tensors > 10_000:
        each = f"{number(measured.wall.median / case.tensors * 1e6)} us a tensor"
        counted = "; ".join(filter(None, (each, counted)))
    floor = FLOOR in case.columns
    return [
        name,
        number(measured.wall.median * 1e3),
        number(measured.wall.low * 1e3),
        number(measured.wall.high * 1e3),
        number(case.nbytes / measured.wall.median / 1e9),
        number(ratio(case.columns, name, FLOOR)) if floor else "",
        number(measured.processor.median * 1e3),
        number(processor_ratio(case.columns, name, FLOOR)) if floor else "",
        counted,
    ]


def _plot(cases: Iterable[Case], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for case in cases:
        bars: dict[str, Any] = {
            name: case.nbytes / measured.wall.median / 1e9
            for name, measured in case.columns.items()
        }
        if bars:
            file = "".join(c if c.isalnum() else "-" for c in case.name)
            while "--" in file:
                file = file.replace("--", "-")
            (directory / f"io-{file.strip('-')}.svg").write_text(bar_chart(case.name, bars, "GB/s"))
