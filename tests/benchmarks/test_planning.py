"""The planning benchmark on a few ranks: what it counts, not what it times."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import planning_dcp, planning_ours
from benchmarks.planning import extrapolated, simulated_targets
from benchmarks.planning_layouts import LAYOUTS, sharded
from benchmarks.report import Target, fitted_exponent, markdown_table, number

TENSORS = 42
BESIDE = 100
"""Replicated tensors."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [8, 24])
def test_shards_tile_their_tensors(layout: str, world_size: int) -> None:
    covered: dict[str, int] = {}
    for rank in range(world_size):
        for part in sharded(LAYOUTS[layout], world_size, rank, TENSORS):
            covered[part.fqn] = covered.get(part.fqn, 0) + part.sizes[0] * part.sizes[1]
    wholes = {p.fqn: p.shape for p in sharded(LAYOUTS[layout], world_size, 0, TENSORS)}
    assert len(wholes) == TENSORS
    assert covered == {name: rows * columns for name, (rows, columns) in wholes.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_ours(layout: str) -> None:
    row = planning_ours.measure(layout, 16, TENSORS, 1)
    assert list(row["first"]) == ["agree", "plan", "write"]
    assert list(row["second"]) == ["agree", "write"]
    assert row["chunks"] == 16 * TENSORS + BESIDE
    # A rank's share of the whole exchange, whatever the machine.
    first, second = row["first_bytes"], row["second_bytes"]
    assert sum(phase["out_max"] + phase["in_max"] for phase in first.values()) < 8192
    assert second["agree"]["out_max"] + second["agree"]["in_max"] <= 256
    assert row["manifest_bytes"] / row["chunks"] < 64


def test_a_row_of_dcp_describes_the_same_state() -> None:
    theirs = planning_dcp.measure("grid", 8, TENSORS, 1)
    ours = planning_ours.measure("grid", 8, TENSORS, 1)
    assert theirs["chunks"] == ours["chunks"] == 8 * TENSORS + BESIDE
    assert theirs["bytes"]["plan_out"] > ours["first_bytes"]["plan"]["out"]


def row_of_dcp(world_size: int, plan: float) -> dict[str, Any]:
    return {
        "engine": "torch DCP",
        "world_size": world_size,
        "plan": plan,
        "finish": plan / 2,
        "peak_bytes": 1000 * world_size,
        "manifest_bytes": 100 * world_size,
        "chunks": world_size,
        "bytes": {"plan_out": 5, "results_out": 5, "plan_in": 5, "metadata_in": 100 * world_size},
        "load": {"open": plan, "same": plan},
    }


def test_rows_that_were_not_run_follow_the_slope() -> None:
    quadratic = extrapolated([row_of_dcp(8, 1.0), row_of_dcp(16, 4.0)], 64)
    assert quadratic["plan"] == pytest.approx(64.0)
    assert quadratic["manifest_bytes"] == 6400
    assert quadratic["bytes"]["plan_out"] == 5
    assert quadratic["extrapolated"]
    # A constant part makes the slope flat at first; it is never taken for less than linear.
    assert extrapolated([row_of_dcp(8, 1.0), row_of_dcp(16, 1.5)], 32)["plan"] == 3.0
    assert extrapolated([row_of_dcp(8, 1.0)], 32)["plan"] == 4.0


def test_targets_judge_the_worst_sharding() -> None:
    def row(layout: str, world_size: int, plan: float) -> dict[str, Any]:
        sent = {"out_max": 100.0, "in_max": 50.0}
        return {
            "engine": "dcp_engine",
            "layout": layout,
            "world_size": world_size,
            "tensors": 10,
            "first": {"agree": 0.0, "plan": plan, "write": 0.0},
            "second": {"agree": plan / 100, "write": 0.0},
            "first_bytes": {"agree": sent, "plan": sent, "write": sent},
            "second_bytes": {"agree": sent, "write": sent},
            "manifest_bytes": 10.0 * world_size,
            "chunks": world_size,
            "load": {"open": plan, "same": plan / 4},
        }

    rows = [row("rows", 256, 0.2), row("rows", 1024, 0.8), row("grid", 256, 0.2)]
    rows.append(row("grid", 1024, 1.6))
    missed = [target.text for target in simulated_targets(rows) if not target.passed]
    assert missed == [
        "first plan with its commit at 1,024 ranks",
        f"growth exponent, {LAYOUTS['grid'].title}",
    ]


def test_numbers_and_tables() -> None:
    assert [number(v) for v in (0.0012345, 12.345, 123456.0, None)] == [
        "0.00123", "12.3", "123,456", "",
    ]  # fmt: skip
    assert fitted_exponent([1, 10, 100], [2, 200, 20000]) == pytest.approx(2.0)
    lines = markdown_table(["a", "long"], [["1,000", "2"]]).splitlines()
    assert lines == ["| a     | long |", "| ----- | ---- |", "| 1,000 |    2 |"]
    target = Target(text="first plan", measured=2.0, limit=1.0, unit="s")
    assert target.line() == "missed  first plan: 2.00 s (at most 1.00 s)"
    target = Target(text="speed", measured=0.9, limit=0.85, at_least=True)
    assert target.line() == "pass    speed: 0.900 (at least 0.850)"
