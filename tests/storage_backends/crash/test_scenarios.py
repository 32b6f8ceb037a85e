"""The engine's saves, crashed everywhere: promise 1 (committed or absent), 2 (committed means
durable), and that a next save always works."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storage_backends.testing.crash import Bounds
from storage_backends.testing.crash.__main__ import main
from storage_backends.testing.crash.scenarios import SCENARIOS, Budget

STATES = {
    "first_save": 200,
    "overwrite": 450,
    "overwrite_by_items": 450,
    "overwrite_unsynced": 20,
    "keep_and_prune": 400,
    "prune_orphans": 450,
    "failing_once": 2500,
    "failing_for_good": 1200,
    "failing_first_save": 2200,
    "crash_after_crash": 2500,
    "two_ranks_first": 1000,
    "two_ranks_overwrite": 1500,
    "coordinator_dies": 700,
    "two_savers": 3500,
    "two_first_savers": 2500,
    "neighbours": 5000,
    "saver_and_prune": 1200,
    "shares_first": 1200,
    "shares_over_incomplete": 1000,
    "overwrite_shares": 500,
    "async_overwrites": 800,
    "load_beside_saves": 200,
    "load_beside_first_save": 100,
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
    if name not in ("prune_orphans", "failing_first_save"):
        assert len(report.outcomes) >= 2, report.outcomes


def test_a_run_can_be_repeated() -> None:
    """In the scenarios whose order is drawn, too."""
    few = Bounds(exhaustive=2, pairs=0, random=2)
    budget = replace(Budget(), bounds=few, orders=1, loads=10)
    for name in ("two_ranks_first", "two_savers", "load_beside_saves"):
        assert SCENARIOS[name](budget) == SCENARIOS[name](budget)


@pytest.mark.torture
def test_the_long_run(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert main([]) == 0
