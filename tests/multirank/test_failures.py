"""Every step made to fail on every rank: all raise, the old checkpoint stays, nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_engine as dcp
from storage_backends.testing.faulty_calls import CallFault, faulty_reader, faulty_writer
from tests.multirank import states

pytestmark = pytest.mark.multirank

WRITER_STEPS = ["reset", "observe", "begin_save", "write_columns", "commit_columns"]
COORDINATOR_ONLY = {"observe", "commit_columns"}
READER_STEPS = ["reset", "open_checkpoint", "read_columns"]


class Boom(Exception):
    """What the injected fault raises."""


def _save(path: str, value: float, faults: list[CallFault]) -> dict[str, Any]:
    """Try to save; report what came out of it on this rank."""
    rank = dist.get_rank()
    state = {
        "w": torch.distributed.tensor.distribute_tensor(
            torch.full((8, 4), value), states.meshes(dist.get_world_size())[0]
        ),
        "step": value,
    }
    writer = faulty_writer(dcp.FileSystemWriter(path), faults, rank=rank)
    _meet_before_failing(writer, faults)
    try:
        dcp.save(state, storage_writer=writer, timeout=30)
    except dcp.CheckpointException as error:
        return {"failures": sorted(error.failures), "kind": error.kind, "text": str(error)}
    return {"failures": [], "kind": None, "text": ""}


def _meet_before_failing(double: Any, faults: list[CallFault]) -> None:
    """Where all ranks are to fail, none does before all are there: a rank that comes after the
    first failure is stopped instead, and rightly not named."""
    meeting = [f.method for f in faults if f.ranks == frozenset(range(dist.get_world_size()))]
    enter = double.schedule.enter

    def meet(method: str) -> Any:
        if method in meeting and method != "begin_save":  # which the coordinator calls alone
            dist.barrier()
        return enter(method)

    double.schedule.enter = meet


def _load(path: str, faults: list[CallFault]) -> dict[str, Any]:
    state: dict[str, Any] = {
        "w": torch.distributed.tensor.distribute_tensor(
            torch.zeros(8, 4), states.meshes(dist.get_world_size())[0]
        ),
        "step": None,
    }
    reader = faulty_reader(dcp.FileSystemReader(path), faults, rank=dist.get_rank())
    if any(fault.method == "reset" for fault in faults):  # the one call that all make at once
        _meet_before_failing(reader, faults)
    try:
        dcp.load(state, storage_reader=reader, timeout=30)
    except dcp.CheckpointException as error:
        return {"failures": sorted(error.failures), "kind": error.kind, "text": str(error)}
    return {"failures": [], "value": [*state["w"].full_tensor().unique().tolist(), state["step"]]}


def fail_save(path: str, method: str, failing: list[int]) -> dict[str, Any]:
    """Save 1.0, fail to save 2.0, load, save 3.0, load."""
    fault = CallFault(method=method, error=Boom("injected"), ranks=frozenset(failing))
    first = _save(path, 1.0, [])
    failed = _save(path, 2.0, [fault])
    after = _load(path, [])
    again = _save(path, 3.0, [])
    return {
        "first": first,
        "failed": failed,
        "after": after,
        "again": again,
        "last": _load(path, []),
    }


def fail_load(path: str, method: str, failing: list[int]) -> dict[str, Any]:
    fault = CallFault(method=method, error=Boom("injected"), ranks=frozenset(failing))
    first = _save(path, 1.0, [])
    failed = _load(path, [fault])
    return {"first": first, "failed": failed, "last": _load(path, [])}


def _subsets(world_size: int, method: str) -> list[list[int]]:
    if method in COORDINATOR_ONLY:
        return [[0]]
    return [*([rank] for rank in range(world_size)), list(range(world_size))]


SAVE_CASES = [
    (world_size, method, failing)
    for world_size in (2, 4)
    for method in WRITER_STEPS
    for failing in _subsets(world_size, method)
    if world_size == 2 or len(failing) == world_size or failing == [3] or failing == [0]
]


@pytest.mark.parametrize(("world_size", "method", "failing"), SAVE_CASES)
def test_a_step_of_a_save_fails(
    ranks: Any, tmp_path: Path, world_size: int, method: str, failing: list[int]
) -> None:
    path = tmp_path / "checkpoint"
    # The coordinator begins before the others, so that what is left behind says whose it is.
    named = [0] if method == "begin_save" and 0 in failing else failing
    for result in ranks.run(world_size, fail_save, str(path), method, failing):
        assert result["first"]["failures"] == []
        assert result["failed"]["failures"] == named, result["failed"]["text"]
        assert "injected" in result["failed"]["text"]
        assert result["after"]["value"] == [1.0, 1.0]
        assert result["again"]["failures"] == []
        assert result["last"]["value"] == [3.0, 3.0]
    assert sorted(os.listdir(path))[1:] == ["manifest.json"]
    assert len(os.listdir(path)) == 2


LOAD_CASES = [
    (world_size, method, failing)
    for world_size in (2, 4)
    for method in READER_STEPS
    for failing in _subsets(world_size, method)
    if world_size == 2 or len(failing) == world_size or failing == [3]
]


@pytest.mark.parametrize(("world_size", "method", "failing"), LOAD_CASES)
def test_a_step_of_a_load_fails(
    ranks: Any, tmp_path: Path, world_size: int, method: str, failing: list[int]
) -> None:
    for result in ranks.run(world_size, fail_load, str(tmp_path / "c"), method, failing):
        assert set(result["failed"]["failures"]) <= set(failing), result["failed"]["text"]
        assert result["failed"]["failures"], "the load did not fail"
        assert "injected" in result["failed"]["text"]
        assert result["last"]["value"] == [1.0, 1.0]
