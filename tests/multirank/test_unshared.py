"""A store that one process sees only is refused where several ranks meet, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_engine as dcp
from storage_backends.memory import MemoryStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from tests.multirank.pool import RankPool

pytestmark = pytest.mark.multirank


class ItemPlanner(dcp.DefaultSavePlanner):
    """Makes the save go by items."""

    def create_local_plan(self) -> dcp.SavePlan:
        return super().create_local_plan()


class ItemLoadPlanner(dcp.DefaultLoadPlanner):
    """Makes the load go by items."""

    def create_local_plan(self) -> dcp.LoadPlan:
        return super().create_local_plan()


def _save(by_items: bool) -> dict[str, Any]:
    store = MemoryStore("memory://here")
    planner = ItemPlanner() if by_items else None
    writer = ShardedWriter(lambda _: store, "memory://here")
    try:
        dcp.save({"w": torch.ones(4)}, storage_writer=writer, planner=planner, timeout=30)
    except dcp.CheckpointException as error:
        return {"kind": error.kind, "text": str(error), "left": [f.name for f in store.list()]}
    return {}


def _load(by_items: bool) -> dict[str, Any]:
    store = MemoryStore("memory://here")
    if dist.get_rank() == 0:
        writer = ShardedWriter(lambda _: store, "memory://here")
        dcp.save({"w": torch.ones(4)}, storage_writer=writer, no_dist=True)
    dist.barrier()
    reader = ShardedReader(lambda _: store, "memory://here")
    planner = ItemLoadPlanner() if by_items else None
    try:
        dcp.load({"w": torch.zeros(4)}, storage_reader=reader, planner=planner, timeout=30)
    except dcp.CheckpointException as error:
        return {"kind": error.kind, "text": str(error)}
    return {}


@pytest.mark.parametrize("by_items", [False, True])
def test_a_save(ranks: RankPool, by_items: bool) -> None:
    for answer in ranks.run(2, _save, by_items):
        assert answer["kind"] == "unsupported_storage"
        assert "MemoryStore is seen by one process only" in answer["text"]
        assert answer["left"] == []


@pytest.mark.parametrize("by_items", [False, True])
def test_a_load(ranks: RankPool, by_items: bool) -> None:
    for answer in ranks.run(2, _load, by_items):
        assert answer["kind"] == "unsupported_storage", answer
        assert "MemoryStore is seen by one process only" in answer["text"]
