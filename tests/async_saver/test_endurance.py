"""Many saves in a row cost no more memory and no more descriptors than a few."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from tests.async_saver.states import assert_holds, every_kind

SAVES = 200
SETTLED = 80
"""Saves until every cache is full."""
WINDOW = 30
"""Saves of which the one with the least memory counts: what the allocator holds back for the next
goes up and down by some MiB."""
LIMIT = 60
MIB = 1 << 20


@pytest.fixture
def engine() -> Iterator[dcp.Engine]:
    made = dcp.Engine()
    yield made
    made.close()


def holdings(pid: int) -> dict[str, int]:
    """Descriptors, threads, and bytes of memory of its own."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
        "own": int(fields["RssAnon"].split()[0]) * 1024,
        "shared": int(fields["RssShmem"].split()[0]) * 1024,
    }


@pytest.mark.parametrize("kind", list(dcp.AsyncCheckpointerType))
def test_200_saves(engine: dcp.Engine, tmp_path: Path, kind: dcp.AsyncCheckpointerType) -> None:
    """Overwriting two checkpoints in turn; objects change their size."""
    before: list[list[dict[str, int]]] = []
    after: list[list[dict[str, int]]] = []
    state: dict[str, Any] = {}
    for turn in range(SAVES):
        state = every_kind(turn)
        state["turns"] = list(range(turn % 7))
        engine.async_save(
            state, checkpoint_id=tmp_path / str(turn % 2), async_checkpointer_type=kind
        ).result(LIMIT)
        if SETTLED - WINDOW <= turn < SETTLED:
            before.append([holdings(pid) for pid in processes(engine)])
        if turn >= SAVES - WINDOW:
            after.append([holdings(pid) for pid in processes(engine)])
    count = 2 if kind is dcp.AsyncCheckpointerType.PROCESS else 1
    assert len(before) == len(after) == WINDOW
    for at in range(count):
        early, late = least([turn[at] for turn in before]), least([turn[at] for turn in after])
        assert late["descriptors"] <= early["descriptors"], (early, late)
        assert late["threads"] <= early["threads"], (early, late)
        assert late["shared"] <= early["shared"], (early, late)
        # 120 saves of 1.2 MB each: a leak of one in a hundred would show.
        assert late["own"] - early["own"] < 2 * MIB, (early, late)
    assert_holds(tmp_path / "1", SAVES - 1)
    assert engine._async is not None
    assert len(engine._async._responses) <= 1


def least(turns: list[dict[str, int]]) -> dict[str, int]:
    return {name: min(turn[name] for turn in turns) for name in turns[0]}


def processes(engine: dcp.Engine) -> list[int]:
    return [os.getpid(), *([] if engine.worker_pid is None else [engine.worker_pid])]


def test_the_staged_memory_is_one_copy(engine: dcp.Engine, tmp_path: Path) -> None:
    """Of the largest state so far, whatever is saved."""
    for size in (1, 8, 2, 8, 4):
        state = {"w": torch.ones(size * MIB // 4)}
        engine.async_save(state, checkpoint_id=tmp_path / "c").result(LIMIT)
    assert engine._async is not None
    assert engine._async._stager.arenas.present() < 9 * MIB
