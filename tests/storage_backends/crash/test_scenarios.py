"""The engine's saves, crashed everywhere: promise 1 (committed or absent), 2 (committed means
durable), and that a next save always works."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
    "two_ranks_first": 1300,
    "two_ranks_overwrite": 2200,
    "coordinator_dies": 1200,
    "two_savers": 6000,
    "two_first_savers": 5000,
    "saver_and_prune": 2200,
    "shares_first": 2000,
    "shares_over_incomplete": 1700,
    "overwrite_shares": 500,
    "load_beside_saves": 300,
    "load_beside_first_save": 150,
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
    budget = replace(Budget(), orders=2, loads=20, starts=1)
    for name in ("two_ranks_first", "two_savers", "shares_first", "load_beside_saves"):
        assert SCENARIOS[name](budget) == SCENARIOS[name](budget)


@pytest.mark.torture
def test_the_long_run(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert main([]) == 0
