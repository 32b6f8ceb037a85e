"""Where a checkpoint of torch's own DCP lies: loads say so, saves warn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp  # noqa: TID251

import dcp_engine as dcp
from dcp_engine.loader.latest import places_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.checkpoint")

STATE = {"w": torch.ones(2)}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "step-1"
    torch_dcp.save(STATE, checkpoint_id=path)  # alone, as no process group is there
    return path


def test_a_load_says_what_it_is(theirs: Path) -> None:
    target = {"w": torch.zeros(2)}
    with pytest.raises(
        dcp.CheckpointException, match=r"of torch\.distributed\.checkpoint"
    ) as caught:
        dcp.load(target, checkpoint_id=theirs, no_dist=True)
    assert caught.value.kind == "not_found"
    with pytest.raises(dcp.NotFoundError, match=r"Load it with torch\.distributed\.checkpoint"):
        dcp.open(theirs)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"{}" * 500, None, "nowhere"])
def test_another_file_of_that_name_is_none(
    tmp_path: Path, content: bytes | str | None, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / ".metadata"
    if content is None:
        other.mkdir()
    elif isinstance(content, str):
        other.symlink_to(content)
    else:
        other.write_bytes(content)
    with pytest.raises(dcp.NotFoundError, match="there is no checkpoint here"):
        dcp.open(tmp_path)
    dcp.save(STATE, checkpoint_id=tmp_path, no_dist=True)
    assert not caplog.records
    dcp.open(tmp_path).close()


def test_a_save_beside_it_warns(theirs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """torch goes on to load what it saved."""
    dcp.save({"w": torch.zeros(2)}, checkpoint_id=theirs, no_dist=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(theirs) in record.getMessage() and "torch's load" in record.getMessage()
    target = {"w": torch.full((2,), 7.0)}
    dcp.load(target, checkpoint_id=theirs, no_dist=True)
    assert target["w"].tolist() == [0, 0]
    caplog.clear()
    dcp.save(STATE, checkpoint_id=theirs.parent / "step-2", no_dist=True)
    assert not caplog.records


def test_the_newest_is_looked_for_among_them_too(theirs: Path) -> None:
    root = theirs.parent
    target: dict[str, Any] = {"w": torch.zeros(2)}
    with pytest.raises(dcp.NotFoundError, match=r"step-1: this is a checkpoint of torch"):
        dcp.latest(root)
    dcp.save({"w": torch.full((2,), 3.0)}, checkpoint_id=root / "step-2", no_dist=True)
    report = dcp.load(target, latest_in=root, no_dist=True)
    assert target["w"].tolist() == [3, 3]
    assert report.latest is not None
    (passed_over,) = report.latest.passed_over
    assert (passed_over.checkpoint, passed_over.kind) == (str(theirs), "not_found")
    assert "torch.distributed.checkpoint" in passed_over.reason


def test_its_places_go_by_one_file() -> None:
    names = ["a/.metadata", "b/.metadata/", "c/.metadata/x", ".metadata", "data/x.distcp"]
    assert places_of(names) == ["a"]
