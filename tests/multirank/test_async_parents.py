"""Training processes killed while their workers save: no orphans, no halves, no hanging ranks."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.async_saver.gated import wait_until
from tests.async_saver.test_process import gone, shared_memory_of
from tests.multirank import async_parent_cases as cases
from tests.multirank.async_parent_cases import NEW, OLD
from tests.multirank.pool import RanksFailed

pytestmark = pytest.mark.multirank

SAMPLE = [
    ("start", [1]),
    ("staging", [0]),
    ("planning", [1]),
    ("writing", [0, 1]),
    ("commit", [0]),
]
REST = [
    ("start", [0]),
    ("staging", [1]),
    ("planning", [0]),
    ("writing", [0]),
    ("writing", [1]),
    ("committed", [0]),
    ("committed", [1]),
    ("start", [0, 1]),
    ("staging", [0, 1]),
    ("planning", [0, 1]),
]


@pytest.mark.parametrize(
    ("point", "victims"),
    [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.torture) for case in REST)],
)
def test_parents_are_killed(ranks: Any, tmp_path: Path, point: str, victims: list[int]) -> None:
    """The store is the test's own: both ranks may die without taking it along."""
    path, notes = tmp_path / "c", tmp_path / "notes"
    notes.mkdir()
    ranks.run(2, cases.save_old, str(path))
    # Ranks that are expected to be killed are ended when the others have answered: here are none.
    expected = victims if len(victims) == 1 else []
    found: list[Any] = [None, None]
    with pytest.raises(RanksFailed) if not expected else nullcontext():
        found = ranks.run(
            2,
            cases.lose_parents,
            str(path),
            str(notes),
            victims,
            point,
            timeout=120,
            expect_kill=expected,
            # A forked one would be up, and at work, before the signal comes.
            real_workers=point == "start",
        )
    for rank, survivor in enumerate(found):
        if rank in victims:
            assert survivor is None
            continue
        if point == "committed" and victims == [1]:
            # All that rank 1 had to do was done.
            assert survivor["failed"] in ([], [1])
        else:
            assert survivor["failed"] == victims, survivor
            assert survivor["kind"] in ("stalled", "timeout", "commit_in_doubt"), survivor
        assert survivor["next"]
    for victim in victims:
        parent, worker = cases.processes_of(str(notes), victim)
        wait_until(lambda worker=worker: gone(worker), "the end of the worker")
        assert gone(parent)
        assert not shared_memory_of(parent, worker)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (path / f"data-{manifest['save_id']}").is_dir()
    whole = ranks.run(2, cases.look_and_go_on, str(path))
    assert whole[0] == whole[1] == [NEW if point == "committed" else OLD]
    assert len(list(path.glob("data-*"))) == 1, "the next save removed what was left"
