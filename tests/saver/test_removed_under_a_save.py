"""A rank that leaves at once takes the data directory along while another one still writes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.coordination.interface import Deadlines, Session
from dcp_engine.coordination.simulated import run_simulated
from dcp_engine.default_planner import DefaultSavePlanner
from dcp_engine.saver import PlanMemory, SaveOptions, save
from dcp_engine.state.adapters import GroupRanks
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_writer import ShardedWriter

LIMIT = 30.0


class ItemPlanner(DefaultSavePlanner):
    """Another planner than the default one: the save goes item by item."""

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        return super().finish_plan(new_plan)


class Writer(ShardedWriter):
    """Rank 1 leaves before it writes; rank 0 begins to write when nothing is there any more."""

    def __init__(self, path: Path, rank: int, gone: threading.Event) -> None:
        super().__init__(FileSystemStore, path, thread_count=1)
        self._number = rank
        self._gone = gone

    def write_columns(self, *args: Any, **kwargs: Any) -> Any:
        self._leave_or_wait()
        return super().write_columns(*args, **kwargs)

    def abort_save(self) -> None:
        super().abort_save()
        self._gone.set()

    def _leave_or_wait(self) -> None:
        if self._number == 1:
            raise SystemExit("rank 1 has had enough")
        assert self._gone.wait(LIMIT)


class ItemWriter(Writer):
    """The same in DCP's life cycle."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        self._leave_or_wait()
        return super().write_data(*args, **kwargs)

    def abort(self) -> None:
        super().abort()
        self._gone.set()


@pytest.mark.parametrize("items", [False, True], ids=["columns", "items"])
def test_only_the_rank_that_left_is_named(tmp_path: Path, items: bool) -> None:
    gone = threading.Event()
    path = tmp_path / "c"

    def on_rank(session: Session) -> None:
        save(
            session,
            {"w": torch.ones(8), f"own{session.rank}": torch.ones(3)},
            checkpoint_id=None,
            writer=(ItemWriter if items else Writer)(path, session.rank, gone),
            planner=ItemPlanner() if items else None,
            group=GroupRanks(ranks=(0, 1), rank=session.rank),
            world_size=2,
            memory=PlanMemory(),
            options=SaveOptions(deadlines=Deadlines(timeout=LIMIT, stall_timeout=LIMIT)),
        )

    stays, left = run_simulated(2, on_rank)
    assert isinstance(left, SystemExit)
    assert isinstance(stays, dcp.CheckpointException)
    assert sorted(stays.failures) == [1], stays
    assert "had enough" in str(stays)
    assert os.listdir(path) == []
