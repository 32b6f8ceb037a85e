"""``python -m benchmarks planning``: planning and coordination against torch's DCP.

Three parts: W ranks simulated in one process (time, bytes, memory, manifest), real gloo ranks
(bytes and calls through the store, wall time), and a long write (store operations a second).
Belongs here: options, the order of the parts, tables and targets. Does not belong here: measuring
(``planning_ours``, ``planning_dcp``, ``planning_ranks``, ``planning_store``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import planning_ranks, planning_store
from benchmarks.measuring import run_row
from benchmarks.planning_layouts import LAYOUTS
from benchmarks.report import (
    Target,
    fitted_exponent,
    machine,
    markdown_table,
    number,
    write_json,
)

__all__ = ["add_arguments", "main"]

Row = dict[str, Any]
_PARTS = ("simulated", "ranks", "store")
_JUDGED = 1024
"""Ranks for which the targets are given."""
_OVERHEAD = 64
"""Below, constant costs hide how cost grows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--sizes", default="8,64,256,1024", help="world sizes (%(default)s)")
    parser.add_argument("--largest", default="4096", help="more, ours only (%(default)s)")
    parser.add_argument("--tensors", type=int, default=1000, help="a rank (%(default)s)")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="%(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many (%(default)s)")
    parser.add_argument(
        "--dcp-seconds",
        type=float,
        default=40.0,
        help="rows of DCP that would take its coordinator longer are computed from its slope",
    )
    parser.add_argument("--parts", default=",".join(_PARTS), help="%(default)s")
    parser.add_argument("--json", help="write all numbers to this file")


def main(options: argparse.Namespace) -> int:
    """Run, print, and say what was missed; 0 if no target was."""
    parts = options.parts.split(",")
    unknown = [part for part in parts if part not in _PARTS]
    unknown += [name for name in options.layouts.split(",") if name not in LAYOUTS]
    if unknown:
        print(f"unknown: {', '.join(unknown)}", file=sys.stderr)
        return 2
    content: dict[str, Any] = {"machine": machine()}
    print("\n".join(f"{name}: {value}" for name, value in content["machine"].items()), flush=True)
    targets: list[Target] = []
    if "simulated" in parts:
        rows = _simulate(options)
        content["simulated"] = rows
        for layout in options.layouts.split(","):
            print(f"\n## {LAYOUTS[layout].title}\n")
            print(_tables([row for row in rows if row["layout"] == layout]), flush=True)
        targets += simulated_targets(rows)
    if "ranks" in parts:
        content["ranks"] = [
            planning_ranks.run(world_size, options.tensors) for world_size in (2, 4, 8)
        ]
        print("\n## Real processes (gloo, filesystem)\n")
        print(planning_ranks.table(content["ranks"]), flush=True)
    if "store" in parts:
        content["store"] = planning_store.run()
        print("\n## Store operations of the whole job during a long write\n")
        print(planning_store.table(content["store"]), flush=True)
        targets += planning_store.targets(content["store"])
    if targets:
        print("\n## Targets\n")
        print("\n".join(target.line() for target in targets))
    if options.json:
        write_json(options.json, content)
    return 0 if all(target.passed for target in targets) else 1


def _simulate(options: argparse.Namespace) -> list[Row]:
    sizes = [int(size) for size in options.sizes.split(",")]
    largest = [int(size) for size in options.largest.split(",") if size]
    rows: list[Row] = []
    for layout in options.layouts.split(","):
        for world_size in [*sizes, *largest]:
            request = {
                "layout": layout,
                "world_size": world_size,
                "tensors": options.tensors,
                "rounds": options.rounds,
            }
            _progress(f"{layout}, {world_size} ranks")
            rows.append(run_row("benchmarks.planning_ours", request))
        theirs: list[Row] = []
        for world_size in sizes:
            if _expected(theirs, world_size) <= options.dcp_seconds:
                request = {
                    "layout": layout,
                    "world_size": world_size,
                    "tensors": options.tensors,
                    "rounds": min(options.rounds, 3) if world_size < 64 else 1,
                }
                _progress(f"{layout}, {world_size} ranks, DCP")
                theirs.append(run_row("benchmarks.planning_dcp", request))
        rows += theirs
        measured = {row["world_size"] for row in theirs}
        rows += [extrapolated(theirs, size) for size in sizes if size not in measured]
    return rows


def _expected(rows: Sequence[Row], world_size: int) -> float:
    if not rows:
        return 0.0
    row = extrapolated(rows, world_size)
    return float(row["plan"] + row["finish"])


def extrapolated(rows: Sequence[Row], world_size: int) -> Row:
    """DCP's row for more ranks than it was measured with, from the slope of the last two rows
    (or proportional to the last), at least linear."""
    last, before = rows[-1], rows[-2] if len(rows) > 1 else None
    factor = world_size / last["world_size"]

    def grown(*path: str) -> float:
        end, begin = _at(last, path), _at(before, path) if before is not None else None
        exponent = 1.0
        if begin is not None and before is not None:
            exponent = fitted_exponent([before["world_size"], last["world_size"]], [begin, end])
        return float(end * factor ** max(exponent, 1.0))

    return {
        **last,
        "world_size": world_size,
        "extrapolated": True,
        "plan": grown("plan"),
        "finish": grown("finish"),
        "peak_bytes": grown("peak_bytes"),
        "manifest_bytes": last["manifest_bytes"] * factor,
        "chunks": last["chunks"] * factor,
        "bytes": {**last["bytes"], "metadata_in": last["bytes"]["metadata_in"] * factor},
        "load": {name: grown("load", name) for name in last["load"]},
    }


def _at(row: Row, path: Sequence[str]) -> float:
    value: Any = row
    for name in path:
        value = value[name]
    return float(value)


_SAVING = (
    "engine",
    "ranks",
    "first save: plan s",
    "commit s",
    "of both, kernel s",
    "second save: plan s",
    "commit s",
    "peak MiB",
)
_MOVING = (
    "engine",
    "ranks",
    "first save: bytes out",
    "bytes in",
    "second: out",
    "in",
    "manifest MB",
    "bytes/chunk",
    "open s",
    "open, plan load s",
    "on 8 ranks s",
)


def _tables(rows: Sequence[Row]) -> str:
    saving, moving = [], []
    ordered = sorted(rows, key=lambda row: (row["world_size"], row["engine"] != "dcp_engine"))
    for row in ordered:
        ours = row["engine"] == "dcp_engine"
        name = [row["engine"] + ("*" if row.get("extrapolated") else ""), f"{row['world_size']:,}"]
        times, sent = _ours(row) if ours else _theirs(row)
        load = row["load"]
        manifest = row["manifest_bytes"]
        figures = [*sent, manifest / 1e6, manifest / row["chunks"], load["open"], load["same"]]
        faults = sum(row["first_kernel"].values()) if "first_kernel" in row else None
        saving.append(
            [*name, *map(number, [*times[:2], faults, *times[2:], row["peak_bytes"] / 2**20])]
        )
        moving.append([*name, *map(number, [*figures, load.get("eight")])])
    return "\n\n".join(
        (markdown_table(_SAVING, saving), markdown_table(_MOVING, moving), _own_work(ordered))
    )


def _own_work(rows: Sequence[Row]) -> str:
    """What each rank does before it sends anything: the same whatever the number of ranks."""
    told = {}
    for row in rows:
        times = ", ".join(f"{k} {number(v * 1e3)} ms" for k, v in row["local_seconds"].items())
        told[row["engine"]] = f"{row['engine']}: {times}"
    return "A rank's own work, once a save. " + "; ".join(told.values()) + "."


def _ours(row: Row) -> tuple[list[float], list[float]]:
    first, second = row["first"], row["second"]
    times = [first["agree"] + first["plan"], first["write"], second["agree"], second["write"]]
    sent = [
        _bytes(row[save], way) for save in ("first_bytes", "second_bytes") for way in ("out", "in")
    ]
    return times, sent


def _theirs(row: Row) -> tuple[list[float], list[float]]:
    sent = row["bytes"]
    out, back = sent["plan_out"] + sent["results_out"], sent["plan_in"] + sent["metadata_in"]
    # Its plan cache is off unless asked for: the second save is the first once more.
    return [row["plan"], row["finish"]] * 2, [out, back] * 2


def _bytes(of_phases: dict[str, dict[str, float]], way: str) -> float:
    return sum(phase[way] for phase in of_phases.values())


def simulated_targets(rows: Sequence[Row]) -> list[Target]:
    """What planning may cost, over all shardings that were measured: the worst counts."""
    ours = [row for row in rows if row["engine"] == "dcp_engine"]
    judged = [row for row in ours if row["world_size"] == _JUDGED]
    targets: list[Target] = []

    def add(text: str, unit: str, limit: float, values: Sequence[float]) -> None:
        if values:
            targets.append(Target(text=text, measured=max(values), limit=limit, unit=unit))

    at = f"at {_JUDGED:,} ranks"
    add(f"first plan with its commit {at}", "s", 1.0, [sum(r["first"].values()) for r in judged])
    for layout in dict.fromkeys(row["layout"] for row in ours):
        grown = [r for r in ours if r["layout"] == layout and r["world_size"] >= _OVERHEAD]
        if len(grown) > 1:
            add(f"growth exponent, {LAYOUTS[layout].title}", "", 1.05, [_growth(grown)])
    add(f"second plan {at}", "s", 0.05, [r["second"]["agree"] for r in judged])
    add(
        f"second plan, a rank's bytes out and in {at}",
        "B",
        256,
        [
            r["second_bytes"]["agree"]["out_max"] + r["second_bytes"]["agree"]["in_max"]
            for r in judged
        ],
    )
    add(
        f"first save, a rank's bytes out and in {at}",
        "B",
        8192,
        [
            sum(phase["out_max"] + phase["in_max"] for phase in r["first_bytes"].values())
            for r in judged
        ],
    )
    add(f"manifest {at}", "B/chunk", 32, [r["manifest_bytes"] / r["chunks"] for r in judged])
    add(
        f"opening the manifest and planning one rank's load {at}",
        "s",
        0.5,
        [r["load"]["same"] for r in judged],
    )
    return targets


def _growth(rows: Sequence[Row]) -> float:
    """The exponent in ranks times tensors of the first save, the kernel's time included."""
    items = [row["world_size"] * row["tensors"] for row in rows]
    return fitted_exponent(items, [sum(row["first"].values()) for row in rows])


def _progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)
