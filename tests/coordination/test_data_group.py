"""A group of its own for tensors: what arrives, what ends a wait, what a broken connection says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_engine.coordination.data_group import DataGroup
from dcp_engine.errors import CoordinationError


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def nothing() -> None:
    return None


class Stop(Exception):
    """What ``check`` raises."""


def together(*ranks: Callable[[Any, int], Any]) -> list[Any]:
    """Run each on a thread of its own, with a store and its rank; what they returned or raised."""
    store = dist.HashStore()
    results: list[Any] = [None] * len(ranks)

    def run(rank: int) -> None:
        try:
            results[rank] = ranks[rank](store, rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_tensors_arrive_by_tag() -> None:
    def swap(store: Any, rank: int) -> list[list[int]]:
        with DataGroup(store, rank=rank, world_size=2, check=nothing) as group:
            got = [torch.zeros(4, dtype=torch.uint8) for _ in range(2)]
            done = group.watch(
                [
                    group.receive(got[0], 1 - rank, 0),
                    group.receive(got[1], 1 - rank, 1),
                    group.send(torch.full((4,), 10 + rank, dtype=torch.uint8), 1 - rank, 1),
                    group.send(torch.full((4,), rank, dtype=torch.uint8), 1 - rank, 0),
                ]
            )
            group.finish(done)
            return [tensor.tolist() for tensor in got]

    assert together(swap, swap) == [[[1] * 4, [11] * 4], [[0] * 4, [10] * 4]]


def test_check_ends_a_wait_and_closing_does_not_hang() -> None:
    waiting, gone = threading.Event(), threading.Event()

    def stop() -> None:
        if waiting.is_set():
            raise Stop

    def receiver(store: Any, rank: int) -> None:
        try:
            with DataGroup(store, rank=rank, world_size=2, check=stop) as group:
                transfer = group.receive(torch.zeros(4, dtype=torch.uint8), 1, 0)
                waiting.set()
                group.finish(group.watch([transfer]))
        finally:
            gone.set()

    def silent(store: Any, rank: int) -> None:
        with DataGroup(store, rank=rank, world_size=2, check=nothing):
            assert gone.wait(30)

    stopped, other = together(receiver, silent)
    assert isinstance(stopped, Stop)
    assert other is None
    assert not [t for t in threading.enumerate() if t.name == "dcp_engine-data"]


def test_a_rank_that_leaves_is_named() -> None:
    connected = threading.Event()

    def waits(store: Any, rank: int) -> None:
        with DataGroup(store, rank=rank, world_size=2, check=nothing) as group:
            transfer = group.receive(torch.zeros(4, dtype=torch.uint8), 1, 0)
            connected.set()
            group.finish(group.watch([transfer]))

    def leaves(store: Any, rank: int) -> None:
        with DataGroup(store, rank=rank, world_size=2, check=nothing) as group:
            connected.wait(30)
            group.receive(torch.zeros(4, dtype=torch.uint8), 0, 0)

    error, other = together(waits, leaves)
    assert isinstance(error, CoordinationError)
    assert error.kind == "rank_failed"
    assert "rank 1 broke" in str(error)
    assert other is None


def test_ranks_that_do_not_come_are_given_up_by_check() -> None:
    def stop() -> None:
        raise Stop

    store = dist.HashStore()
    with pytest.raises(Stop):
        DataGroup(store, rank=0, world_size=2, check=stop)
    # One comes after all; what was left waiting for it ends.
    DataGroup(store, rank=1, world_size=2, check=nothing).close()
    for thread in threading.enumerate():
        if thread.name == "dcp_engine-data":
            thread.join(30)
            assert not thread.is_alive()
