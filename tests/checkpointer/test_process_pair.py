"""The children of two ranks, whose parents have no torch.distributed: they meet over a barrier's
store. Both parents are this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.checkpointer import (
    CheckpointProcess,
    CheckpointWriterConfig,
    RankInfo,
    TCPStoreBarrier,
)
from dcp_engine.checkpointer.builder import default_subprocess_init_fn, default_writer_init_fn
from dcp_engine.errors import CheckpointException, UnsupportedStateError
from tests.checkpointer.test_barriers import tcp_args
from tests.checkpointer.test_process import CONFIG
from tests.ports import free_port

Outcome = BaseException | None


@pytest.fixture(scope="module")
def pair() -> Iterator[list[CheckpointProcess]]:
    args = {
        "config": CheckpointWriterConfig(write_barrier_timeout_secs=60, stall_timeout_secs=30),
        "barrier_class": TCPStoreBarrier,
        "barrier_args": tcp_args(free_port(), timeout_barrier_init_secs=60),
    }
    made = [
        CheckpointProcess(
            RankInfo(rank, 2), CONFIG, default_subprocess_init_fn, (), default_writer_init_fn, args
        )
        for rank in range(2)
    ]
    yield made
    for process in made:
        process.close()


def write(pair: list[CheckpointProcess], path: Path, *states: dict[str, Any]) -> list[Outcome]:
    futures = [process.write(state, str(path)) for process, state in zip(pair, states, strict=True)]
    return [future.exception(100) for future in futures]


def ranks_of(path: Path) -> list[Any]:
    with dcp.open(path) as checkpoint:
        found = checkpoint.per_rank("rank")
        return [found[rank].load() for rank in range(2)]  # type: ignore[union-attr]


def test_they_commit_together_and_again_after_the_host_of_the_store_died(
    pair: list[CheckpointProcess], tmp_path: Path
) -> None:
    path = tmp_path / "c"
    assert write(pair, path, {"rank": 0}, {"rank": 1}) == [None, None]
    assert ranks_of(path) == [0, 1]
    pair[0].ping(60)
    pid = pair[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)  # the one that hosts the store
    assert write(pair, path, {"rank": 2}, {"rank": 3}) == [None, None]
    assert ranks_of(path) == [2, 3]


def test_a_rank_that_has_nothing_to_write_fails_the_others_by_name(
    pair: list[CheckpointProcess], tmp_path: Path
) -> None:
    first = pair[0].write({"rank": 0, "w": torch.ones(2)}, str(tmp_path / "c"))
    with pytest.raises(UnsupportedStateError):
        pair[1].write({"rank": lambda: 1}, str(tmp_path / "c"))
    error = first.exception(100)
    assert isinstance(error, CheckpointException)
    assert list(error.failures) == [1]
    assert error.tensor == "rank"
    assert write(pair, tmp_path / "c", {"rank": 4}, {"rank": 5}) == [None, None]
    assert ranks_of(tmp_path / "c") == [4, 5]
