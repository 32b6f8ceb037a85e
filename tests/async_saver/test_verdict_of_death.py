"""What a rank says of a save whose worker died: by what the manifest says, where it says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.async_saver.job import SaveJob
from dcp_engine.async_saver.messages import COMMITTED
from dcp_engine.async_saver.verdict_of_death import settle_dead_worker
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Outcome
from dcp_engine.coordination.single import SingleSession
from dcp_engine.errors import CoordinationError
from dcp_engine.saver import PlanMemory, SaveOptions
from dcp_engine.state.adapters import GroupRanks

OTHER = "0" * 32


class OneOfTwo(SingleSession):
    """Rank 1 of two, whose operation ended as it is told; None: the store is lost."""

    def __init__(self, outcome: Outcome | None) -> None:
        super().__init__(run_identity(""))
        self.rank, self.world_size = 1, 2
        self.outcome = outcome

    def report_death(self, number: int, **options: Any) -> Outcome:
        if self.outcome is None:
            raise CoordinationError("gone", kind="store_lost")
        return self.outcome


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
    path: Path, outcome: Outcome | None, save_id: str, phase: str, *, foreign: bool = False
) -> str:
    """``committed``, or the kind of the failure."""
    job = SaveJob(
        session=OneOfTwo(outcome),
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
            job, CoordinationError("died", kind="worker_died"), save_id=save_id, phase=phase
        )
    except dcp.CheckpointException as error:
        return error.kind
    return "committed"


def test_what_is_committed_is_no_failure(tmp_path: Path, committed: str) -> None:
    """The other ranks had gone on, and this one's word came too late to be heard: there was
    nothing left of the operation but its manifest."""
    for phase in ("write", COMMITTED):
        assert settle(tmp_path, "abort", committed, phase) == "committed"
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
    assert settle(tmp_path, "abort", OTHER, COMMITTED) == "commit_in_doubt"
    assert settle(tmp_path, "abort", OTHER, COMMITTED, foreign=True) == "commit_in_doubt"
    assert settle(tmp_path, "abort", OTHER, "write", foreign=True) == "worker_died"
