"""The engine's saves, crashed everywhere: promise 1 (committed or absent), 2 (committed means
durable), and that a next save always works."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storage_backends.testing.crash import Bounds
from storage_backends.testing.crash.__main__ import main
from storage_backends.testing.crash.scenarios import SCENARIOS, Budget

STATES = {
    "first_save": 160,
    "overwrite": 330,
    "overwrite_by_items": 330,
    "overwrite_unsynced": 20,
    "keep_and_prune": 300,
    "prune_orphans": 300,
    "failing_once": 2500,
    "failing_for_good": 1600,
    "failing_first_save": 2300,
    "crash_after_crash": 2020,
    "killed_then_prune": 1900,
    "killed_then_next_save": 9000,
    "two_ranks_first": 410,
    "two_ranks_overwrite": 700,
    "one_rank_fails": 300,
    "coordinator_dies": 470,
    "two_savers": 5180,
    "two_first_savers": 2770,
    "neighbours": 4700,
    "saver_and_prune": 1340,
    "shares_first": 1140,
    "shares_over_incomplete": 1040,
    "overwrite_shares": 370,
    "async_overwrites": 1800,
    "async_by_worker": 650,
    "worker_dies": 150,
    "load_beside_saves": 150,
    "load_beside_first_save": 75,
}
"""How many states each scenario goes through at least. Fewer would mean that it lost its way: an
operation that is not recorded, a save that fails before it begins."""


def test_there_are_enough() -> None:
    assert list(STATES) == list(SCENARIOS)
    assert sum(STATES.values()) >= 10_000


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_crash_loses_a_checkpoint(name: str) -> None:
    report = SCENARIOS[name](Budget())
    print(f"\n{report.heading()}\n{report.row()}")
    assert not report.violations, "\n".join(map(str, report.violations[:10]))
    assert report.states >= STATES[name]
    # Both sides of a commit were seen, where there is one.
    if name not in ("prune_orphans", "failing_first_save", "one_rank_fails"):
        assert len(report.outcomes) >= 2, report.outcomes


def test_a_run_can_be_repeated() -> None:
    """In the scenarios whose order is drawn, too."""
    few = Bounds(exhaustive=2, pairs=0, random=2)
    budget = replace(Budget(), bounds=few, orders=1, overtaken=(5,), loads=10)
    for name in ("two_ranks_first", "shares_first", "load_beside_saves"):
        assert SCENARIOS[name](budget) == SCENARIOS[name](budget)


@pytest.mark.torture
def test_the_long_run(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert main([]) == 0
