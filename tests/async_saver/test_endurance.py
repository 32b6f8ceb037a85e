"""Many saves in a row cost no more memory and no more descriptors than a few."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dcp_engine as dcp

LIMIT = 60
MIB = 1 << 20


@pytest.fixture
def engine() -> Iterator[dcp.Engine]:
    made = dcp.Engine()
    yield made
    made.close()


@pytest.mark.parametrize("kind", list(dcp.AsyncCheckpointerType))
def test_200_saves(tmp_path: Path, kind: dcp.AsyncCheckpointerType) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.async_saver.endurance", kind.value, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    count = 2 if kind is dcp.AsyncCheckpointerType.PROCESS else 1
    assert len(found["early"]) == len(found["late"]) == count
    for early, late in zip(found["early"], found["late"], strict=True):
        assert late["descriptors"] <= early["descriptors"], (early, late)
        assert late["threads"] <= early["threads"], (early, late)
        assert late["shared"] <= early["shared"], (early, late)
        # 120 saves of 1.2 MB each: a leak of one in a hundred would show.
        assert late["own"] - early["own"] < 2 * MIB, (early, late)
    assert found["responses"] <= 1


def test_the_staged_memory_is_one_copy(engine: dcp.Engine, tmp_path: Path) -> None:
    """Of the largest state so far, whatever is saved."""
    for size in (1, 8, 2, 8, 4):
        state = {"w": torch.ones(size * MIB // 4)}
        engine.async_save(state, checkpoint_id=tmp_path / "c").result(LIMIT)
    assert engine._async is not None
    assert engine._async._stager.arenas.present() < 9 * MIB
