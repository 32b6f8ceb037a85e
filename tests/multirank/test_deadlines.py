"""Ranks that die, hang, or are slow in every phase: who is named, and that all others raise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.multirank import deadline_cases as cases
from tests.multirank.pool import RankPool

pytestmark = pytest.mark.multirank

LOST = [
    # kind, phase, victim, in the coordinator's decision, phase as it is named
    ("save", "agree", 1, False, "agree"),
    ("save", "agree", 0, True, "agree"),
    ("save", "plan", 2, False, "plan"),
    ("save", "plan", 0, True, "plan"),
    ("save", "write", 1, False, "write"),
    ("save", "write", 0, True, "commit"),
    ("load", "metadata", 0, False, "metadata"),
    ("load", "plan", 2, False, "plan"),
    ("load", "read", 1, False, "read"),
    ("load", "read", 0, False, "read"),
]


def names(result: dict[str, Any], victim: int, phase: str) -> None:
    """The error of a survivor says who, where, and since when."""
    assert (result["kind"], result["ranks"]) == ("stalled", [victim]), result["text"]
    who = (
        rf"missing rank {victim}, the coordinator,"
        if victim == 0
        else rf"missing ranks \[{victim}\]"
    )
    # Survivors of a coordinator may name the phase they wait in by its first half.
    where = rf'in phase "({phase}|write)"' if phase == "commit" else rf'in phase "{phase}"'
    assert re.search(rf"{who} {where} after [0-9.]+ s, last heard [0-9.]+ s ago", result["text"])
    assert result["seconds"] < 40.0  # long before `timeout`, which would be another kind


@pytest.mark.parametrize(("kind", "phase", "victim", "deciding", "named"), LOST)
def test_a_stopped_rank_is_named_and_raises_when_it_wakes(
    ranks: RankPool,
    tmp_path: Path,
    kind: str,
    phase: str,
    victim: int,
    deciding: bool,
    named: str,
) -> None:
    path = str(tmp_path / "checkpoint")
    results = ranks.run(3, cases.stopped, path, kind, phase, victim, deciding)
    for rank, result in enumerate(results):
        if rank != victim:
            names(result, victim, named)
        else:
            assert result["kind"] is not None, "the rank that woke late went on"
        assert result["then"]["value"] == [1.0]
        assert result["last"] == [3.0]
    # Nothing of the failed save is left, once all have raised.
    assert results[0]["files"] == ["data-", "manif"]


KILLED = [
    [("save", "agree", 1, False), ("save", "agree", 0, True)],
    [("save", "plan", 1, False), ("save", "plan", 0, True)],
    [("save", "write", 1, False), ("save", "write", 0, True)],
    [("load", "plan", 1, False), ("load", "read", 0, False)],
]


@pytest.mark.parametrize("pairs", KILLED)
def test_a_killed_rank_is_named(
    ranks: RankPool, tmp_path: Path, pairs: list[tuple[str, str, int, bool]]
) -> None:
    """Two jobs at once, because it takes long to start ranks again."""
    victims = [2 * pair + victim for pair, (_, _, victim, _) in enumerate(pairs)]
    results = ranks.run(4, cases.killed, str(tmp_path), pairs, expect_kill=victims)
    for pair, (_, phase, victim, deciding) in enumerate(pairs):
        survivor = results[2 * pair + 1 - victim]
        names(survivor, victim, "commit" if deciding and phase == "write" else phase)
        assert survivor["then"] == [1.0, 1.0]


def test_a_coordinator_stopped_while_it_commits_leaves_a_doubt(
    ranks: RankPool, tmp_path: Path
) -> None:
    results = ranks.run(3, cases.stopped_while_committing, str(tmp_path / "checkpoint"))
    for result in results:
        assert result["kind"] == "commit_in_doubt", result["text"]
        assert result["then"] == [2.0]  # it was committed after all
    for result in results[1:]:
        assert result["ranks"] == [0]
        assert result["before"] == ["data-", "data-", "manif"]  # nobody deleted anything


@pytest.mark.parametrize(
    ("phase", "deciding", "kind"),
    [("agree", False, "store_lost"), ("write", True, "commit_in_doubt")],
)
def test_the_death_of_the_stores_host_is_no_ranks_fault(
    ranks: RankPool, tmp_path: Path, phase: str, deciding: bool, kind: str
) -> None:
    path = str(tmp_path / "checkpoint")
    results = ranks.run(
        3, cases.store_killed, path, phase, deciding, expect_kill=[0], host_in_rank=0
    )
    for result in results[1:]:
        assert (result["kind"], result["ranks"]) == (kind, [])
        assert "the store at localhost:" in result["text"]
        assert "frame #" not in result["text"]


LATE = [
    ("save", "agree", {"phase_timeouts": {"agree": 1.0}}),
    ("save", "write", {"phase_timeouts": {"write": 1.0}}),
    ("save", "write", {"timeout": 1.5}),
    ("load", "read", {"phase_timeouts": {"read": 1.0}}),
]


@pytest.mark.parametrize(("kind", "phase", "deadlines"), LATE)
def test_a_late_rank_is_named_at_the_deadline(
    ranks: RankPool, tmp_path: Path, kind: str, phase: str, deadlines: dict[str, Any]
) -> None:
    results = ranks.run(3, cases.hanging, str(tmp_path / "c"), kind, phase, deadlines)
    for result in results:
        assert (result["kind"], result["ranks"]) == ("timeout", [1]), result["text"]
        assert result["then"] == [1.0]
    for result in results[::2]:
        assert f'in phase "{phase}" after ' in result["text"]
        assert "frame #" not in result["text"]


def test_a_slow_write_that_beats_is_no_stall(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, cases.slow_but_beating, str(tmp_path / "c")) == [[4.0]] * 2


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_stops_the_long_writes_of_the_others(
    ranks: RankPool, tmp_path: Path, failing: int
) -> None:
    results = ranks.run(3, cases.failure_in_a_long_write, str(tmp_path / "c"), failing)
    for rank, result in enumerate(results):
        assert result["ranks"] == [failing], result["text"]
        assert "boom in the write" in result["text"]
        assert result["left"] == []
        if rank != failing:
            assert 2 <= result["writes"] < 40  # of 65


def test_two_saves_at_once_on_overlapping_groups(ranks: RankPool, tmp_path: Path) -> None:
    for rank, results in enumerate(ranks.run(4, cases.overlapping_groups, str(tmp_path), 3)):
        assert results == [[number + 10.0 * (rank // 2), number] for number in range(3)]


def test_saves_beside_training(ranks: RankPool, tmp_path: Path) -> None:
    for sums, loaded in ranks.run(2, cases.beside_training, str(tmp_path / "c"), 3):
        assert sums == [2 * step + 1 for step in range(len(sums))]
        assert len(sums) >= 50
        assert loaded == [5.0]


def test_a_job_whose_backend_moves_nothing(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(3, cases.without_a_backend, str(tmp_path / "c"), backend="fake")
    for rank, result in enumerate(results):
        assert result["backend"] == "fake"
        assert result["found"] == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [rank, rank], 3]
        assert result["failed"] and set(result["failed"]) <= {1, 2}
