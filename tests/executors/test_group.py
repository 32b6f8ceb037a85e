"""The process group of a worker, where one process is enough to see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_engine.coordination.address import StoreAddress
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import SessionHandle
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.single import SingleSession, SingleSessionHandle
from dcp_engine.coordination.store import StoreSessionHandle
from dcp_engine.errors import CoordinationError, UsageError
from dcp_engine.executors.process.group import WorkerGroup

stores: Any = dist


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    assert not dist.is_initialized()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def single() -> SessionHandle:
    return SingleSession(run_identity("")).handle()


def of_two(port: int) -> StoreSessionHandle:
    return StoreSessionHandle(
        address=StoreAddress(kind="tcp", host="localhost", port=port),
        rank=0,
        world_size=2,
        identity=run_identity("g"),
        name="session",
        rhythm=Rhythm(),
    )


def test_one_rank_needs_no_store() -> None:
    with WorkerGroup(single()) as group:
        assert group.generation == 0
        for generation in (1, 1, 2, 7):
            group.ensure(generation)
            assert (group.generation, dist.get_world_size()) == (generation, 1)
            value = torch.tensor([3])
            dist.all_reduce(value)
            assert int(value) == 3
        with pytest.raises(UsageError, match=r"generation 6 .* the present one is 7"):
            group.ensure(6)
        assert dist.is_initialized()
    assert not dist.is_initialized()
    group.close()


def test_somebody_elses_group_is_left_alone() -> None:
    dist.init_process_group("gloo", store=stores.HashStore(), rank=0, world_size=1)
    with WorkerGroup(single()) as group, pytest.raises(UsageError, match="somebody else's"):
        group.ensure(1)
    assert dist.is_initialized()


def test_generation_0_is_the_parents() -> None:
    with WorkerGroup(single()) as group, pytest.raises(UsageError, match="generation 0"):
        group.ensure(0)


def test_a_worker_that_does_not_come() -> None:
    store = stores.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    with WorkerGroup(of_two(store.port), timeout=0.3) as group:
        with pytest.raises(CoordinationError, match="did not find each other in generation 1"):
            group.ensure(1)
        assert not dist.is_initialized()
        with pytest.raises(UsageError, match="has passed"):
            group.ensure(1)


def test_the_host_of_the_store_is_gone() -> None:
    store = stores.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    port = store.port
    del store
    group = WorkerGroup(of_two(port), timeout=0.3)
    with pytest.raises(CoordinationError, match="cannot be reached") as lost:
        group.ensure(1)
    assert lost.value.kind == "store_lost"


def test_a_handle_without_a_store() -> None:
    handle = SingleSessionHandle(identity=run_identity("g"), world_size=2)
    with WorkerGroup(handle) as group, pytest.raises(UsageError, match="names no store"):
        group.ensure(1)
