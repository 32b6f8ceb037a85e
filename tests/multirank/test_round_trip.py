"""Real gloo ranks: what was saved on N ranks is what M ranks load, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import dcp_engine as dcp
from tests.multirank import states

pytestmark = pytest.mark.multirank


def save_state(path: str, own: bool) -> str:
    world_size = dist.get_world_size()
    metadata = dcp.save(
        states.state(world_size, filled=True, own=own),
        storage_writer=dcp.FileSystemWriter(path),
        timeout=60,
    )
    return str(metadata.state_dict_metadata["sharded.rows"].size)


def load_state(path: str, turned: bool, own: bool) -> list[str]:
    world_size = dist.get_world_size()
    state: dict[str, Any] = states.state(world_size, filled=False, turned=turned, own=own)
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), timeout=60)
    return states.differences(state, world_size, own=own)


@pytest.mark.parametrize("world_size", [2, 4])
def test_round_trip_on_the_same_ranks(ranks: Any, tmp_path: Path, world_size: int) -> None:
    sizes = ranks.run(world_size, save_state, str(tmp_path / "c"), True)
    assert sizes == ["torch.Size([13, 6])"] * world_size
    assert ranks.run(world_size, load_state, str(tmp_path / "c"), False, True) == [[]] * world_size


@pytest.mark.parametrize(
    ("savers", "loaders"), [(2, [4, 1]), (1, [4]), (4, [2])], ids=["2-4-1", "1-4", "4-2"]
)
def test_reshard(ranks: Any, tmp_path: Path, savers: int, loaders: list[int]) -> None:
    ranks.run(savers, save_state, str(tmp_path / "c"), False)
    for loader in loaders:
        wrong = ranks.run(loader, load_state, str(tmp_path / "c"), True, False)
        assert wrong == [[]] * loader
