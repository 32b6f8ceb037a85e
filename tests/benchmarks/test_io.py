"""The I/O benchmark on a tiny state: that cases run and are judged, not what they take."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.io_case import FLOOR, Case, Setting
from benchmarks.io_cases import LOAD_WARM, RANGE, SAVE_SMALL, UNVERIFIED, one_process
from benchmarks.io_rank_cases import READ_RATIO, ROWS_OF_4
from benchmarks.io_targets import io_targets
from benchmarks.measure import Figure, Measured


def measured(seconds: float) -> Measured:
    figure = Figure(median=seconds, low=seconds, high=seconds)
    return Measured(
        wall=figure, processor=figure, wall_rounds=(seconds,), processor_rounds=(seconds,)
    )


def test_one_process(tmp_path: Path) -> None:
    setting = Setting(size=1 << 20, rounds=1, disk=str(tmp_path), memory=str(tmp_path))
    wanted = {LOAD_WARM, RANGE}
    cases = {case.name: case for case in one_process(setting, wanted.__contains__)}
    assert cases.keys() == wanted
    ways = {"ours", UNVERIFIED, FLOOR, "DCP", "DCP best", "torch.save", "safetensors"}
    assert ways <= cases[LOAD_WARM].columns.keys()
    judged = {target.text: target for target in io_targets(list(cases.values()))}
    beyond = judged[f"{RANGE}, bytes read beyond the range"]
    assert 0 < beyond.measured <= beyond.limit
    assert not list(tmp_path.iterdir())


def test_targets() -> None:
    load = Case(
        name=LOAD_WARM,
        nbytes=1,
        tensors=1,
        columns={
            "ours": measured(2.0),
            UNVERIFIED: measured(1.1),
            FLOOR: measured(1.0),
            "DCP": measured(8.0),
        },
    )
    counts = {
        way: {READ_RATIO: 1.01}
        for way in ("ours, once", "ours, once, no digests", "ours, direct, no digests")
    }
    rows = Case(
        name=ROWS_OF_4,
        nbytes=1,
        tensors=0,
        columns={"ours": measured(1.0), FLOOR: measured(1.0)},
        counts={**counts, "ours, direct": {READ_RATIO: 1.2}},
    )
    small = Case(
        name=SAVE_SMALL,
        nbytes=1,
        tensors=20_000,
        columns={"ours": measured(0.1)},
        counts={"ours": {"bytes on disk / payload": 1.1}},
    )
    missed = [target.text for target in io_targets([load, rows, small]) if not target.passed]
    assert missed == [
        f"{LOAD_WARM}, ours, of the raw floor",
        f"{LOAD_WARM}, processor time of the floor's",
        f"{ROWS_OF_4}, ours, direct, {READ_RATIO}",
    ]
    each = next(t for t in io_targets([small]) if t.unit == "us")
    assert each.measured == pytest.approx(5.0)
