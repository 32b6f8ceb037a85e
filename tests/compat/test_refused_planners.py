"""Planners that are not the engine's, and those whose boxes do not fit, are refused."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp

theirs: Any = importlib.import_module("torch.distributed.checkpoint")
NOT_OURS = {"of torch": theirs.DefaultSavePlanner, "of no class": object}


@pytest.mark.parametrize("make", NOT_OURS.values(), ids=NOT_OURS)
@pytest.mark.parametrize("way", ["save", *dcp.AsyncCheckpointerType])
def test_a_save_planner_of_another_class_is_refused(tmp_path: Path, make: Any, way: Any) -> None:
    """By an asynchronous save at the call."""
    state = {"w": torch.ones(2)}
    with pytest.raises(dcp.CheckpointError, match=r"dcp_engine\.DefaultSavePlanner") as caught:
        if way == "save":
            dcp.save(state, checkpoint_id=tmp_path / "c", planner=make(), no_dist=True)
        else:
            dcp.async_save(
                state,
                checkpoint_id=tmp_path / "c",
                planner=make(),
                async_checkpointer_type=way,
                no_dist=True,
            )
    assert caught.value.kind == "usage"
    assert not (tmp_path / "c").exists()


class TorchsRenamer(theirs.DefaultLoadPlanner):  # type: ignore[misc]
    """Derived from torch's class: its import was not changed."""


NOT_OURS_TO_LOAD = {**NOT_OURS, "of torch": theirs.DefaultLoadPlanner, "derived": TorchsRenamer}


@pytest.mark.parametrize("make", NOT_OURS_TO_LOAD.values(), ids=NOT_OURS_TO_LOAD)
def test_a_load_planner_of_another_class_is_refused(tmp_path: Path, make: Any) -> None:
    """Torch's own compares shapes only with metadata of torch's own class."""
    dcp.save({"w": torch.ones(4)}, checkpoint_id=tmp_path, no_dist=True)
    target = {"w": torch.zeros(3)}
    with pytest.raises(dcp.CheckpointError, match=r"dcp_engine\.DefaultLoadPlanner") as caught:
        dcp.load(target, checkpoint_id=tmp_path, planner=make(), no_dist=True)
    assert caught.value.kind == "usage"
    assert not target["w"].any()


class OtherBoxLoadPlanner(dcp.DefaultLoadPlanner):
    """Plans boxes as it was told."""

    def __init__(self, at_dest: int, at_stored: int, length: int) -> None:
        super().__init__()
        self.box = {
            "dest_offsets": torch.Size([at_dest]),
            "storage_offsets": torch.Size([at_stored]),
            "lengths": torch.Size([length]),
        }

    def create_local_plan(self) -> dcp.LoadPlan:
        return dcp.LoadPlan(
            [replace(item, **self.box) for item in super().create_local_plan().items]
        )


@pytest.mark.parametrize(
    "box",
    [(1, 0, 3), (2, 0, 2), (-1, 0, 1), (0, 0, 4), (0, 1, 3), (0, -1, 1), (0, -2, 3)],
)
def test_a_box_that_does_not_fit_is_refused(tmp_path: Path, box: tuple[int, int, int]) -> None:
    """Neither cut nor moved to where it fits."""
    dcp.save({"w": torch.arange(1.0, 4.0)}, checkpoint_id=tmp_path, no_dist=True)
    target = {"w": torch.zeros(3)}
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target, checkpoint_id=tmp_path, planner=OtherBoxLoadPlanner(*box), no_dist=True)
    assert (caught.value.kind, caught.value.tensor) == ("plan_overlap", "w")
    assert not target["w"].any()


def test_a_box_that_fits_is_read(tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(1.0, 4.0)}, checkpoint_id=tmp_path, no_dist=True)
    target = {"w": torch.zeros(3)}
    dcp.load(target, checkpoint_id=tmp_path, planner=OtherBoxLoadPlanner(1, 0, 2), no_dist=True)
    assert target["w"].tolist() == [0, 1, 2]
