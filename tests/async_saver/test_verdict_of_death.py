"""What a rank says of a save whose worker died: by what the manifest says, where it says it."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.async_saver.job import SaveJob
from dcp_engine.async_saver.verdict_of_death import settle_dead_worker
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import DeathVerdict, Outcome
from dcp_engine.coordination.single import SingleSession
from dcp_engine.errors import CoordinationError
from dcp_engine.saver import PlanMemory, SaveOptions
from dcp_engine.state.adapters import GroupRanks

OTHER = "0" * 32


class OneOfTwo(SingleSession):
    """Rank 1 of two, whose operation ended as it is told; None: the store is lost. ``failure`` is
    what all ranks raise."""

    def __init__(
        self, outcome: Outcome | None, failure: dcp.CheckpointException | None = None
    ) -> None:
        super().__init__(run_identity(""))
        self.rank, self.world_size = 1, 2
        self.outcome = outcome
        self.failure = failure

    def report_death(self, number: int, **options: Any) -> DeathVerdict:
        if self.outcome is None:
            raise CoordinationError("gone", kind="store_lost")
        return DeathVerdict(outcome=self.outcome, failure=self.failure)


class Foreign(dcp.StorageWriter):
    """Says nothing of commits."""

    reset = set_up_storage_writer = prepare_local_plan = prepare_global_plan = None  # type: ignore[assignment]
    write_data = finish = validate_checkpoint_id = None  # type: ignore[assignment]


@pytest.fixture
def committed(tmp_path: Path) -> str:
    """The save id of a checkpoint that is there."""
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    return str(json.loads((tmp_path / "manifest.json").read_text())["save_id"])


def settle(
    path: Path,
    outcome: Outcome | None,
    save_id: str,
    phase: str,
    *,
    foreign: bool = False,
    told: dcp.CheckpointException | None = None,
    failure: dcp.CheckpointException | None = None,
) -> str:
    """``committed``, or the kind of the failure."""
    job = SaveJob(
        session=OneOfTwo(outcome, failure),
        number=0,
        checkpoint_id=str(path),
        writer=Foreign() if foreign else dcp.FileSystemWriter(path),  # type: ignore[abstract]
        group=GroupRanks(),
        world_size=2,
        memory=PlanMemory(),
        options=SaveOptions(),
    )
    try:
        settle_dead_worker(
            job,
            CoordinationError("died", kind="worker_died"),
            save_id=save_id,
            phase=phase,
            told=told,
        )
    except dcp.CheckpointException as error:
        assert error is not told or "then the worker was lost" in "".join(error.__notes__)
        return error.kind
    return "committed"


def test_what_is_committed_is_no_failure(tmp_path: Path, committed: str) -> None:
    """The manifest is the last word, whatever the ranks say."""
    assert settle(tmp_path, "abort", committed, "write") == "committed"
    assert settle(tmp_path, "commit", committed, "write") == "committed"


def test_what_is_not_committed_is_one(tmp_path: Path, committed: str) -> None:
    assert settle(tmp_path, "abort", OTHER, "write") == "worker_died"
    assert settle(tmp_path, "abort", "", "agree") == "worker_died"
    assert settle(tmp_path, "commit", "", "agree") == "worker_died"


def test_what_nobody_can_say_is_in_doubt(
    tmp_path: Path, committed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_engine.async_saver.verdict_of_death._COMMIT_PATIENCE", 0.0)
    assert settle(tmp_path, None, committed, "write") == "commit_in_doubt"
    assert settle(tmp_path, "commit", OTHER, "write") == "commit_in_doubt"
    assert settle(tmp_path, "abort", OTHER, "write", foreign=True) == "worker_died"


def failed(kind: str, *causes: BaseException | None) -> dcp.CheckpointException:
    """On the ranks that have a cause."""
    stack = traceback.StackSummary.from_list([])
    failures = {rank: (cause, stack) for rank, cause in enumerate(causes) if cause is not None}
    return dcp.CheckpointException("the first one", failures, kind=kind)


def test_what_the_save_had_failed_with_is_what_it_fails_with(
    tmp_path: Path, committed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker died as it tidied up: ``told`` by itself, or known to the other ranks."""
    monkeypatch.setattr("dcp_engine.async_saver.verdict_of_death._COMMIT_PATIENCE", 0.0)
    full = dcp.StorageError("full", kind="disk_full")
    for phase in ("write", "commit"):
        for how in ("told", "failure"):
            first = {how: failed("disk_full", None, full)}
            assert settle(tmp_path, "abort", OTHER, phase, **first) == "disk_full"
            assert settle(tmp_path, "abort", "", phase, **first) == "disk_full"
            # The coordinator itself says that it replaced nothing.
            first = {how: failed("disk_full", full)}
            assert settle(tmp_path, "commit", OTHER, phase, **first) == "disk_full"
            first = {how: failed("commit_in_doubt", full)}
            assert settle(tmp_path, "commit", OTHER, phase, **first) == "commit_in_doubt"
            # It was to commit, and then nobody heard of it.
            silent = CoordinationError("missing", kind="stalled")
            first = {how: failed("stalled", silent)}
            assert settle(tmp_path, "commit", OTHER, phase, **first) == "commit_in_doubt"
            assert settle(tmp_path, "commit", committed, phase, **first) == "committed"
