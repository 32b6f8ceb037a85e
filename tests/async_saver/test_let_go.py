"""What a save has let go of when it is over, although its future is kept."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch

import dcp_engine as dcp
from tests.async_saver.test_thread import RecordingPlanner, failing, none_left

LIMIT = 60
SIZE = 1 << 20


def mapped() -> set[str]:
    """Staging memory in this process, by address."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[0] for line in lines if "dcp_engine-staging" in line}


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
@pytest.mark.parametrize("kind", dcp.AsyncCheckpointerType)
@pytest.mark.parametrize("planned", [False, True])
def test_a_closed_engine_has_no_staging_memory(
    tmp_path: Path, kind: dcp.AsyncCheckpointerType, planned: bool
) -> None:
    gc.collect()
    before = mapped()
    with dcp.Engine() as engine:
        response = engine.async_save(
            {"w": torch.ones(SIZE)},
            checkpoint_id=tmp_path / "c",
            planner=RecordingPlanner() if planned else None,
            async_checkpointer_type=kind,
        )
        response.result(LIMIT)
        assert mapped() - before
    gc.collect()
    assert not mapped() - before
    assert response.progress().phase == "done"


def test_progress_is_kept(tmp_path: Path) -> None:
    with dcp.Engine() as engine:
        response = engine.async_save({"w": torch.ones(SIZE)}, storage_writer=failing(tmp_path))
        with pytest.raises(dcp.CheckpointException):
            response.result(LIMIT)
        assert response.progress().phase == "failed"
        assert response.progress().bytes_total >= 4 * SIZE


def test_a_state_that_was_saved_without_a_copy_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_engine.staging.arena.require_memory", none_left)
    with dcp.Engine() as engine:
        state = {"w": torch.ones(SIZE)}
        tensor = weakref.ref(state["w"])
        response = engine.async_save(state, checkpoint_id=tmp_path / "c", on_low_memory="sync")
        assert response.done()
        del state
        gc.collect()
        assert tensor() is None
