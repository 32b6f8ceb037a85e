"""Training processes killed while their workers save: no orphans, no halves, no hanging ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.async_saver.gated import wait_until
from tests.async_saver.test_process import gone, shared_memory_of
from tests.multirank import async_parent_cases as cases
from tests.multirank.async_parent_cases import NEW, OLD

pytestmark = pytest.mark.multirank

SAMPLE = [("start", 1), ("staging", 0), ("planning", 1), ("writing", 1), ("commit", 0)]
REST = [
    ("start", 0),
    ("staging", 1),
    ("planning", 0),
    ("writing", 0),
    ("committed", 0),
    ("committed", 1),
]


@pytest.mark.parametrize(
    ("point", "victim"),
    [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.torture) for case in REST)],
)
def test_a_parent_is_killed(ranks: Any, tmp_path: Path, point: str, victim: int) -> None:
    """The store is the test's own: both ranks may die without taking it along."""
    path, notes = tmp_path / "c", tmp_path / "notes"
    notes.mkdir()
    ranks.run(2, cases.save_old, str(path))
    found = ranks.run(
        2,
        cases.lose_parent,
        str(path),
        str(notes),
        victim,
        point,
        timeout=120,
        expect_kill={victim},
    )
    survivor = found[1 - victim]
    assert found[victim] is None
    if point == "committed" and victim == 1:
        # All that rank 1 had to do was done.
        assert survivor["failed"] in ([], [1])
    else:
        assert survivor["failed"] == [victim], survivor
        assert survivor["kind"] in ("stalled", "timeout", "commit_in_doubt"), survivor
    assert survivor["next"]
    parent, worker = cases.processes_of(str(notes))
    wait_until(lambda: gone(worker), "the end of the worker")
    assert gone(parent)
    assert not shared_memory_of(parent, worker)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (path / f"data-{manifest['save_id']}").is_dir()
    whole = ranks.run(2, cases.look_and_go_on, str(path))
    assert whole[0] == whole[1] == [NEW if point == "committed" else OLD]
    assert len(list(path.glob("data-*"))) == 1, "the next save removed what was left"
