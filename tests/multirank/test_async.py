"""Asynchronous saves on two ranks: whole or not at all, and the next one works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.multirank import async_cases

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_saves_and_failures_in_turn(ranks: Any, tmp_path: Path, kind: str) -> None:
    found = ranks.run(2, async_cases.save_in_turn, str(tmp_path / "c"), kind, timeout=150)
    for rank in (0, 1):
        assert found[rank]["turn 0"]
        assert found[rank]["turn 1"]
        assert found[rank]["turn 2"]
        assert found[rank]["failing"]["failed"] == [1]
        assert "not to be pickled" in found[rank]["failing"]["text"]
        assert found[rank]["old"]
        assert "bad" in found[rank]["at the call"]["text"]
        assert found[rank]["new"]
        assert "no memory" in found[rank]["no memory"]["text"]
        assert found[rank]["direct"]
        assert found[rank]["collectives"] == 0, "of the training group"
        assert found[rank]["worker"] is (kind == "process")
    assert found[0]["at the call"]["failed"] == [1]
    assert "failed" not in found[1]["at the call"], "the rank itself is told at the call"
    assert found[0]["no memory"]["failed"] == [1]
    assert found[1]["waited"], "this rank saved while training waited"


@pytest.mark.parametrize(
    "moments",
    [
        "saving",
        "starting",
        pytest.param("meeting", marks=pytest.mark.torture),
        pytest.param("leaving", marks=pytest.mark.torture),
        pytest.param("stopped", marks=pytest.mark.torture),
    ],
)
def test_killed_workers(ranks: Any, tmp_path: Path, moments: str) -> None:
    gates = tmp_path / "gates"
    gates.mkdir()
    both = ranks.run(
        2,
        async_cases.kill_workers,
        str(tmp_path / "c"),
        str(gates),
        moments,
        timeout=200,
        # A forked one would be up before the signal comes.
        real_workers=moments in ("starting", "meeting"),
    )
    for found in both:
        *killed, last = found
        for case in killed:
            # One that is dead before the save has asked for it is replaced, and nothing fails; one
            # that has left the operation is of no more use to it.
            if case["method"] == "left":
                assert not case["failed"], case
            elif case["method"] not in ("start", "staging") or case["failed"]:
                assert case["failed"] == [case["victim"]], case
                assert _CAUSES.get(case["method"].split()[0], "SIGKILL") in case["text"], case
            assert case["before"], case
            assert case["after"], case
        assert last["planner"]
    for rank, found in enumerate(both):
        pid, backend, seen, world_size = (gates / str(rank)).read_text().split()
        assert int(pid) == found[-1]["pid"], "the planner ran in the worker"
        assert (backend, int(seen), int(world_size)) == ("gloo", rank, 2)


_CAUSES = {"tidying": "on purpose", "stopped": "stalled"}
"""What the failure says of a worker that was not simply killed."""


def test_two_groups_at_once(ranks: Any, tmp_path: Path) -> None:
    for found in ranks.run(2, async_cases.save_in_two_groups, str(tmp_path), timeout=60):
        assert found == {"all": True, "own": True}


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_an_argument_that_fails_on_one_rank(ranks: Any, tmp_path: Path, kind: str) -> None:
    """Reading it is a part of the save: the others are told, and the next save works."""
    cases = ranks.run(2, async_cases.fail_by_an_argument, str(tmp_path / "c"), kind, timeout=60)
    for rank, found in enumerate(cases):
        for victim, word in ((0, "missing-file"), (1, "no copy of this")):
            case = found[f"on {victim}"]
            assert word in case["text"], case
            assert ("failed" not in case) is (rank == victim), "itself is told at the call"
            if rank != victim:
                assert case["failed"] == [victim]
            assert found[f"after {victim}"]


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_failures_that_nobody_looks_at_come_to_an_end(
    ranks: Any, tmp_path: Path, kind: str
) -> None:
    """Raising an earlier failure fails the save of that call on the other ranks, which must not
    make them fail the one after it in their turn."""
    found = ranks.run(2, async_cases.save_and_never_look, str(tmp_path), kind, timeout=60)
    assert found[0]["raised"] == [None, "unsupported_state", None, None, None]
    assert found[1]["raised"] == ["unsupported_state", None, None, None, None]
    first = {"failed": [1], "kind": "unsupported_state"}
    second = {"failed": [0], "kind": "earlier_save_failed"}
    assert found[0]["failures"] == [first, None, None, None, None]
    assert found[1]["failures"] == [None, second, None, None, None]
    assert all(rank["last"] for rank in found)
    assert [(tmp_path / str(turn) / "manifest.json").exists() for turn in range(5)] == [
        turn > 1 for turn in range(5)
    ]


def test_the_rank_that_is_named_without_collectives(ranks: Any, tmp_path: Path) -> None:
    for rank, found in enumerate(ranks.run(2, async_cases.fail_alone, str(tmp_path), timeout=60)):
        assert found["failed"] == {"save": [rank], "thread": [rank], "process": [rank]}
        assert found["worker"] == rank, "though the first save was of this process alone"
