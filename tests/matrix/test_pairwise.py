"""The sample of the matrix, and the judge of its cells."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.cases import FAULTS, PARTS, Case, full_matrix, part_of, sample
from tests.matrix.pairwise import pairs_of, pairwise
from tests.matrix.verdict import complaints


def test_every_pair_that_can_occur_does_occur_in_few_cells() -> None:
    cells = [
        {"a": a, "b": b, "c": c}
        for a, b, c in product(range(5), range(4), range(3))
        if (a, b) != (0, 0)
    ]
    chosen = pairwise(cells, lambda cell: cell)
    wanted = set().union(*map(pairs_of, cells))
    assert set().union(*map(pairs_of, chosen)) == wanted
    assert 19 <= len(chosen) < 30  # 5 * 4 - 1 at least, of 57
    assert chosen == pairwise(cells, lambda cell: cell)


def test_the_sample_strikes_every_call_and_ends_in_every_way() -> None:
    whole = full_matrix()
    chosen = sample(whole)
    assert {case.site for case in chosen} == {case.site for case in whole}
    for names in combinations(("subset", "fault", "when", "world_size", "coordinator"), 2):
        assert {_values(case, names) for case in chosen} == {_values(case, names) for case in whole}
    assert chosen == sample(whole)


def test_the_parts_are_the_whole() -> None:
    whole = full_matrix(["async process"])
    parts = [part_of(whole, number) for number in range(1, PARTS + 1)]
    assert sorted(map(str, whole)) == sorted(str(case) for part in parts for case in part)
    for part in parts:
        assert {case.site for case in part} == {case.site for case in whole}
        assert {case.fault for case in part} == set(FAULTS)


def _values(case: Case, names: tuple[str, str]) -> tuple[Any, ...]:
    return tuple(getattr(case, name) for name in names)


def test_names_tell_cells_apart() -> None:
    whole = full_matrix()
    assert len({str(case) for case in whole}) == len(whole)
    assert {case.fault for case in whole} == set(FAULTS)


# -- the judge ---------------------------------------------------------------------------------


@pytest.fixture
def case() -> Case:
    (found,) = [
        case
        for case in full_matrix(["save"])
        if str(case)
        == "save/columns/writer.write_columns: exception before on one of 2 ranks, coordinator 0"
    ]
    return found


@pytest.fixture
def control(tmp_path: Path) -> str:
    (tmp_path / "fault-fired-1").touch()
    return str(tmp_path)


def as_it_should_be() -> list[dict[str, Any]]:
    return [
        {
            "raised": "CheckpointException",
            "kind": "rank_failed",
            "ranks": [1],
            "text": "injected",
            "left over": {},
            "value": 5.0,
            "files": ["data-1", "manifest.json"],
            "then": [5.0],
            "saved": ["data-2", "manifest.json"],
            "last": [7.0],
            "pruned": ["data-2", "manifest.json"],
        }
        for _ in range(2)
    ]


def test_nothing_to_complain_of(case: Case, control: str) -> None:
    reports = as_it_should_be()
    assert complaints(case, control, reports, reports) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("raised", ""),
        ("raised", "KeyboardInterrupt"),
        ("kind", "timeout"),
        ("ranks", [0, 1]),
        ("ranks", []),
        ("text", "something else"),
        ("left over", {"socket": 1}),
        ("files", ["data-1", "data-2", "manifest.json"]),
        ("then", [6.0]),
        ("then", [5.0, 6.0]),
        ("last", [5.0]),
        ("pruned", ["data-1", "data-2", "manifest.json"]),
    ],
)
def test_complaints(case: Case, control: str, field: str, value: Any) -> None:
    reports = as_it_should_be()
    reports[0][field] = value
    assert complaints(case, control, reports, reports) != []


@pytest.mark.parametrize(
    ("named", "right"), [([[0], [1]], True), ([[0, 1], [1]], True), ([[1], [0]], False)]
)
def test_a_rank_whose_worker_died_names_itself_at_least(
    tmp_path: Path, named: list[list[int]], right: bool
) -> None:
    name = (
        "async process/columns/writer.write_columns: kill before on all of 2 ranks, coordinator 0"
    )
    (case,) = [case for case in full_matrix(["async process"]) if str(case) == name]
    for rank in range(2):
        (tmp_path / f"fault-fired-{rank}").touch()
    reports = as_it_should_be()
    for report, ranks in zip(reports, named, strict=True):
        report.update(kind="worker_died", ranks=ranks, text="killed")
    assert (complaints(case, str(tmp_path), reports, reports) == []) is right


def test_a_fault_that_was_never_reached_is_no_success(case: Case, tmp_path: Path) -> None:
    reports = as_it_should_be()
    found = complaints(case, str(tmp_path), reports, reports)
    assert found[0] == "the fault was never reached"
