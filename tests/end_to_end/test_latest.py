"""``latest``, ``verify`` and ``load(latest_in=)`` over real checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from tests.locked_directories import lock


def save(path: Path, value: float, **options: Any) -> None:
    value = float(value)
    state = {
        "w": torch.full((5000,), value),
        "blob": ["x"] * 3000,
        "own": dcp.PerRank(torch.full((9,), value)),
        "step": value,
    }
    dcp.save(state, checkpoint_id=path, no_dist=True, **options)


def load(root: Path, **options: Any) -> tuple[float, dcp.LoadReport]:
    state = {"w": torch.zeros(5000), "step": None}
    report = dcp.load(state, latest_in=root, no_dist=True, **options)
    assert state["w"].unique().tolist() == [state["step"]]
    return state["w"][0].item(), report


def flip(path: Path, pattern: str) -> None:
    """Flip one bit in the middle of the only file of that pattern."""
    (file,) = path.glob(pattern)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        save(tmp_path / "run" / f"step-{step}", step)
    return tmp_path / "run"


def test_by_time_not_by_name(root: Path) -> None:
    save(root / "step-1", 10)
    assert dcp.latest(root).checkpoint == f"{root}/step-1"
    value, report = load(root)
    assert value == 10
    assert report.latest == dcp.latest(root)
    assert report.save_id == dcp.latest(root).save_id


def test_what_is_not_whole_is_passed_over(root: Path) -> None:
    flip(root / "step-3", "manifest.json")
    (root / "step-4" / ("data-" + "0" * 32)).mkdir(parents=True)
    found = dcp.latest(root)
    assert found.checkpoint == f"{root}/step-2"
    assert {os.path.basename(p.checkpoint): p.kind for p in found.passed_over} == {
        "step-3": "digest_mismatch",
        "step-4": "not_committed",
    }


def test_full_looks_at_every_byte(root: Path) -> None:
    flip(root / "step-3", "data-*/rank*.safetensors")
    assert dcp.latest(root).checkpoint == f"{root}/step-3", "its manifest is whole"
    found = dcp.latest(root, verify="full")
    assert found.checkpoint == f"{root}/step-2"
    assert [p.kind for p in found.passed_over] == ["digest_mismatch"]
    value, report = load(root, verify="full")
    assert value == 2
    assert report.latest is not None
    assert len(report.latest.passed_over) == 1


def test_verify_reads_everything(tmp_path: Path) -> None:
    save(tmp_path / "c", 1, extra_files={"notes": b"n" * 777})
    report = dcp.verify(tmp_path / "c")
    data = next((tmp_path / "c").glob("data-*/rank*.safetensors")).stat().st_size
    assert report.bytes_read >= 20_000 + 36 + 777
    assert report.bytes_read <= data + 777 + 100
    assert dcp.verify(tmp_path / "c", level="manifest").bytes_read == 0
    for pattern in ("data-*/extra/notes", "data-*/rank*.digests", "data-*/rank*.safetensors"):
        whole = {p: p.read_bytes() for p in (tmp_path / "c").glob(pattern)}
        flip(tmp_path / "c", pattern)
        with pytest.raises(dcp.DamagedCheckpointError):
            dcp.verify(tmp_path / "c")
        for path, content in whole.items():
            path.write_bytes(content)
    dcp.verify(tmp_path / "c")


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcp_engine.loader.verify._PIECE_BYTES", 1000)
    dcp.save({"w": torch.ones(3, 700, 2)}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert dcp.verify(tmp_path / "c").bytes_read == 3 * 700 * 2 * 4


def test_nothing_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(dcp.NotFoundError, match="there is none"):
            dcp.latest(place)
    with pytest.raises(dcp.CheckpointException, match="there is none"):
        load(tmp_path)


def test_bad_questions(root: Path) -> None:
    with pytest.raises(dcp.UsageError, match="verify"):
        dcp.latest(root, verify="some")  # type: ignore[arg-type]
    with pytest.raises(dcp.UsageError, match="verify"):
        dcp.verify(root / "step-1", level="some")  # type: ignore[arg-type]
    with pytest.raises(dcp.UsageError, match="latest_in"):
        dcp.load({}, latest_in=root, checkpoint_id=root / "step-1", no_dist=True)


def test_a_directory_that_may_not_be_read_is_passed_over(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "lost+found").mkdir()
    lock(monkeypatch, "lost+found", "step-3")
    found = dcp.latest(root)
    assert found.checkpoint == f"{root}/step-2"
    reasons = {os.path.basename(p.checkpoint): p.reason for p in found.passed_over}
    assert reasons.keys() == {"lost+found", "step-3"}
    assert all("Permission denied" in reason for reason in reasons.values())
    assert load(root)[0] == 2


def test_a_checkpoint_whose_data_may_not_be_read_is_passed_over(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data,) = (root / "step-3").glob("data-*")
    lock(monkeypatch, data.name)
    found = dcp.latest(root, verify="full")
    assert found.checkpoint == f"{root}/step-2"
    assert ["Permission denied" in p.reason for p in found.passed_over] == [True]
