"""DCP's life cycle carried out by hand, call by call, for several ranks of one process.

Belongs here: drivers and the planners and states that checks use. Does not belong here: checks.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dcp_engine.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from dcp_engine.foreign_calls import takes_keywords
from dcp_engine.metadata import Metadata
from dcp_engine.plan import LoadPlan, ReadItem, SavePlan, WriteItem
from dcp_engine.storage import StorageReader, StorageWriter, WriteResult

__all__ = [
    "CheckpointId",
    "LoadingRank",
    "SavingRank",
    "compare",
    "empty_state",
    "full_state",
    "load_by_hand",
    "save_by_hand",
]

CheckpointId = str | os.PathLike[str]


def full_state(seed: int = 0) -> dict[str, Any]:
    """Tensors of several dtypes and forms, and objects."""
    wide = torch.arange(24.0).reshape(6, 4) + seed
    return {
        "matrix": torch.arange(24.0).reshape(4, 6) + seed,
        "strided": wide.t(),
        "scalar": torch.tensor(3.5 + seed),
        "empty": torch.zeros(0, 3),
        "bf16": torch.arange(7, dtype=torch.bfloat16) + seed,
        "int64": torch.arange(5) * (seed + 2),
        "flags": torch.tensor([True, False, seed % 2 == 0]),
        "large": torch.arange(60_000, dtype=torch.int32) + seed,
        "nested": {"list": [torch.ones(3) * (seed + 1), "text"], "count": 5 + seed},
        "bytes": bytes(range(256)),
        "none": None,
    }


def empty_state() -> dict[str, Any]:
    """The destination of ``full_state``: every tensor there, nothing in it."""
    return {
        "matrix": torch.zeros(4, 6),
        "strided": torch.zeros(6, 4).t(),
        "scalar": torch.tensor(0.0),
        "empty": torch.zeros(0, 3),
        "bf16": torch.zeros(7, dtype=torch.bfloat16),
        "int64": torch.zeros(5, dtype=torch.int64),
        "flags": torch.zeros(3, dtype=torch.bool),
        "large": torch.zeros(60_000, dtype=torch.int32),
        "nested": {"list": [torch.zeros(3), ""], "count": 0},
        "bytes": b"",
        "none": 0,
    }


def compare(found: object, wanted: object, path: str = "state") -> None:
    """Assert that both are the same, bit for bit."""
    assert type(found) is type(wanted), path
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == wanted.dtype, path
        assert torch.equal(found, wanted), path
    elif isinstance(wanted, dict):
        assert isinstance(found, dict)
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            compare(found[key], wanted[key], f"{path}.{key}")
    elif isinstance(wanted, list):
        assert isinstance(found, list)
        assert len(found) == len(wanted), path
        for at, (a, b) in enumerate(zip(found, wanted, strict=True)):
            compare(a, b, f"{path}.{at}")
    else:
        assert found == wanted, path


class _SavePlanner(DefaultSavePlanner):
    """Knows which items were asked for, and fails when it is told to."""

    fail_at: int | None = None
    may_resolve = False

    def __init__(self) -> None:
        super().__init__()
        self.resolved: list[WriteItem] = []

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        assert self.may_resolve, "resolve_data is called before write_data"
        if self.fail_at is not None and len(self.resolved) >= self.fail_at:
            raise RuntimeError("the planner has no data")
        self.resolved.append(write_item)
        return super().resolve_data(write_item)


class SavingRank:
    """One rank of a save: the steps, each as a method, in DCP's order.

    Args:
        writer: of this rank.
        fail_at: ``resolve_data`` fails after so many items.
    """

    def __init__(
        self,
        writer: StorageWriter,
        state: dict[str, Any],
        *,
        rank: int = 0,
        fail_at: int | None = None,
    ) -> None:
        self.writer = writer
        self.planner = _SavePlanner()
        self.planner.fail_at = fail_at
        self._state = state
        self._rank = rank
        self.plan = SavePlan([])
        self.results: list[WriteResult] = []

    def set_up(self, checkpoint_id: CheckpointId | None = None) -> None:
        is_coordinator = self._rank == 0
        self.writer.reset(checkpoint_id)
        self.planner.set_up_planner(
            self._state, storage_meta=self.writer.storage_meta(), is_coordinator=is_coordinator
        )
        if takes_keywords(self.writer.set_up_storage_writer):
            self.writer.set_up_storage_writer(is_coordinator, rank=self._rank, use_collectives=True)
        else:
            self.writer.set_up_storage_writer(is_coordinator)

    def plan_locally(self) -> SavePlan:
        local = self.planner.create_local_plan()
        offered = list(local.items)
        self.plan = self.writer.prepare_local_plan(local)
        assert isinstance(self.plan, SavePlan)
        assert [item.index for item in self.plan.items] == [item.index for item in offered]
        return self.plan

    def plan_globally(self, plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The coordinator's part."""
        shared, metadata = self.planner.create_global_plan(plans)
        prepared = self.writer.prepare_global_plan(shared)
        assert len(prepared) == len(plans), "one plan per rank"
        return prepared, metadata

    def write(self, plan: SavePlan) -> list[WriteResult]:
        self.plan = self.planner.finish_plan(plan)
        self.planner.may_resolve = True
        future = self.writer.write_data(self.plan, self.planner)
        assert isinstance(future, torch.futures.Future)
        self.results = future.wait()
        return self.results


STEPS = ("set up", "plan locally", "plan globally", "write", "finish")


def save_by_hand(
    ranks: Sequence[SavingRank],
    checkpoint_id: CheckpointId | None = None,
    *,
    until: str = "finish",
    before_finish: Callable[[], None] = lambda: None,
) -> Metadata | None:
    """The life cycle on all ``ranks``, the first of which coordinates, up to step ``until``."""
    last = STEPS.index(until)
    for rank in ranks:
        rank.set_up(checkpoint_id)
    if last == 0:
        return None
    local = [rank.plan_locally() for rank in ranks]
    if last == 1:
        return None
    plans, metadata = ranks[0].plan_globally(local)
    if last == 2:
        return None
    results = [rank.write(plan) for rank, plan in zip(ranks, plans, strict=True)]
    if last == 3:
        return None
    before_finish()
    ranks[0].writer.finish(metadata, results)
    return metadata


class _LoadPlanner(DefaultLoadPlanner):
    """Writes down what is handed to it."""

    fail = False

    def __init__(self) -> None:
        super().__init__()
        self.committed: list[tuple[ReadItem, torch.Tensor]] = []
        self.loaded: list[ReadItem] = []

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        if self.fail:
            raise RuntimeError("the planner does not take it")
        self.loaded.append(read_item)
        super().load_bytes(read_item, value)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        if self.fail:
            raise RuntimeError("the planner does not take it")
        self.committed.append((read_item, tensor.clone()))
        super().commit_tensor(read_item, tensor)


class LoadingRank:
    """One rank of a load, as ``SavingRank``."""

    def __init__(self, reader: StorageReader, state: dict[str, Any], *, rank: int = 0) -> None:
        self.reader = reader
        self.state = state
        self.planner = _LoadPlanner()
        self._rank = rank
        self.metadata: Metadata | None = None
        self.plan = LoadPlan([])

    def set_up(self, checkpoint_id: CheckpointId | None = None) -> LoadPlan:
        self.reader.reset(checkpoint_id)
        metadata = self.metadata = self.reader.read_metadata()
        is_coordinator = self._rank == 0
        self.planner.set_up_planner(self.state, metadata, is_coordinator)
        if takes_keywords(self.reader.set_up_storage_reader):
            self.reader.set_up_storage_reader(
                metadata, is_coordinator, rank=self._rank, use_collectives=True
            )
        else:
            self.reader.set_up_storage_reader(metadata, is_coordinator)
        return self.reader.prepare_local_plan(self.planner.create_local_plan())

    def read(self, plan: LoadPlan) -> None:
        self.plan = self.planner.finish_plan(plan)
        future = self.reader.read_data(self.plan, self.planner)
        assert isinstance(future, torch.futures.Future)
        assert future.wait() is None


def load_by_hand(ranks: Sequence[LoadingRank], checkpoint_id: CheckpointId | None = None) -> None:
    """The life cycle on all ``ranks``, the first of which coordinates."""
    local = [rank.set_up(checkpoint_id) for rank in ranks]
    first = ranks[0]
    plans = first.reader.prepare_global_plan(first.planner.create_global_plan(local))
    assert len(plans) == len(ranks), "one plan per rank"
    for rank, plan in zip(ranks, plans, strict=True):
        rank.read(plan)
