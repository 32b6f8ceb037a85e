"""Ranges of a chunk's elements, whatever its shape: what shared reads ask of a reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dcp_engine as dcp
from dcp_engine.errors import DamagedCheckpointError, StateMismatchError
from dcp_engine.planning.load_plan import plan_boxes
from dcp_engine.state.values import Box

SHAPE = (70, 9, 50)
BLOCK = (64 << 10) // 4


def read(path: Path, begin: int, end: int, target: torch.Tensor | None = None) -> torch.Tensor:
    reader = dcp.FileSystemReader(path)
    manifest, _ = reader.open_checkpoint(None)
    try:
        stored = manifest.tensors["w"]
        columns = plan_boxes(stored, [Box(offsets=(0, 0, 0), sizes=SHAPE)])
        columns = replace(
            columns,
            within=np.array([[begin, 0, 0]], np.int64),
            lengths=np.array([[end - begin, 1, 1]], np.int64),
            flat=np.array([True]),
        )
        target = torch.empty(end - begin) if target is None else target
        count = reader.read_columns(manifest, columns, [target], lambda: None)
        low, high = begin // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, 70 * 9 * 50)
        assert count == 4 * (high - low)
        return target
    finally:
        reader.close_checkpoint()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    tensor = torch.arange(70 * 9 * 50, dtype=torch.float32).reshape(SHAPE)
    dcp.save({"w": tensor}, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    return tmp_path / "c", tensor.reshape(-1)


@pytest.mark.parametrize(
    ("begin", "end"),
    [(0, 1), (5, 6), (0, BLOCK), (BLOCK, 70 * 9 * 50), (BLOCK - 1, BLOCK + 1), (7, 31000)],
)
def test_a_range_and_its_blocks_are_read(
    saved: tuple[Path, torch.Tensor], begin: int, end: int
) -> None:
    path, flat = saved
    assert torch.equal(read(path, begin, end), flat[begin:end])


def test_a_destination_of_other_dimensions_is_refused(saved: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(StateMismatchError, match="float32"):
        read(saved[0], 0, 4, torch.empty(2, 2))


def test_a_damaged_block_is_found(saved: tuple[Path, torch.Tensor]) -> None:
    path, _ = saved
    file = next(path.glob("data-*/*.safetensors"))
    data = np.memmap(file, mode="r+")
    data[-1] ^= 1
    data.flush()
    read(path, 0, BLOCK)
    with pytest.raises(DamagedCheckpointError) as caught:
        read(path, BLOCK, BLOCK + 1)
    assert caught.value.tensor == "w"
