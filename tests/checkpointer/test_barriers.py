"""Barriers: the registry, and the one over a store of its own, its ranks on threads."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dcp_engine.checkpointer import (
    Barrier,
    BarrierConfig,
    DistBarrier,
    RankInfo,
    TCPStoreBarrier,
    create_barrier_from_config,
    register_barrier,
)
from dcp_engine.errors import CheckpointException, CoordinationError, UsageError
from tests.ports import free_port


def tcp_args(port: int, **changes: Any) -> dict[str, Any]:
    return {
        "barrier_prefix": "b",
        "timeout_barrier_init_secs": 10,
        "use_checkpoint_barrier_tcpstore_libuv": True,
        "tcpstore_port": port,
        "master_address": "localhost",
        "timeout_secs": 20,
        **changes,
    }


def on_ranks(world_size: int, call: Callable[[int], Any]) -> list[Any]:
    """By rank, what ``call`` returned or raised; the ranks are threads."""
    with ThreadPoolExecutor(world_size) as executor:
        futures = [executor.submit(call, rank) for rank in range(world_size)]
        return [future.exception() or future.result() for future in futures]


def barriers(world_size: int, **changes: Any) -> list[TCPStoreBarrier]:
    args = tcp_args(free_port(), **changes)
    return on_ranks(world_size, lambda rank: TCPStoreBarrier(rank, world_size, **args))


def test_no_barrier_is_made_of_no_type() -> None:
    assert create_barrier_from_config(BarrierConfig()) is None


def test_a_barrier_of_ones_own_is_found_by_its_type() -> None:
    @register_barrier
    class Counting(Barrier):
        barrier_type = "counting"

        def __init__(self, start: int = 0) -> None:
            super().__init__()
            self.count = start

        def execute_barrier(self) -> None:
            self.count += 1

    made = create_barrier_from_config(BarrierConfig("counting", {"start": 4}), RankInfo(1, 2))
    assert isinstance(made, Counting)
    with made as entered:
        entered.execute_barrier()
    assert made.count == 5
    assert made.session() is None

    class Derived(Counting):
        pass  # of the same type, and not registered

    assert type(create_barrier_from_config(BarrierConfig("counting"))) is Counting
    del Derived


def test_an_unknown_type_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"'tcpstore'.*dist_barrier, tcp_store") as caught:
        create_barrier_from_config(BarrierConfig("tcpstore"))
    assert isinstance(caught.value, ValueError)


def test_what_is_no_barrier_is_not_registered() -> None:
    class NoType(Barrier):
        def execute_barrier(self) -> None: ...

    with pytest.raises(UsageError, match="NoType has no barrier_type"):
        register_barrier(NoType)
    with pytest.raises(UsageError, match=r"not a dcp_engine\.Barrier"):
        register_barrier(dict)  # type: ignore[type-var]


def test_a_barrier_over_torch_distributed_needs_it() -> None:
    with pytest.raises(UsageError, match="initialized process group"):
        create_barrier_from_config(BarrierConfig("dist_barrier"))
    assert DistBarrier.barrier_type == "dist_barrier"


def test_no_rank_passes_before_all_have_come_again_and_again() -> None:
    made = barriers(3)
    came: list[tuple[int, int]] = []

    def run(rank: int) -> None:
        for turn in range(3):
            came.append((turn, rank))
            made[rank].execute_barrier()
            assert len([1 for t, _ in came if t == turn]) == 3

    assert on_ranks(3, run) == [None] * 3
    for barrier in made:
        barrier.close()


def test_the_rank_comes_from_the_config_or_from_the_caller() -> None:
    args = tcp_args(free_port())
    config = BarrierConfig("tcp_store", args)
    made = on_ranks(2, lambda rank: create_barrier_from_config(config, RankInfo(rank, 2)))
    assert on_ranks(2, lambda rank: made[rank].execute_barrier()) == [None, None]
    told = BarrierConfig("tcp_store", {"global_rank": 0, "global_world_size": 1, **args})
    while made:
        made.pop().close()
    gc.collect()  # the store ends with its owner, and the port is free
    alone = create_barrier_from_config(told)
    assert alone is not None
    alone.execute_barrier()


def test_ranks_that_do_not_come_are_named_after_the_timeout() -> None:
    made = barriers(3, timeout_secs=0.3)
    outcomes = on_ranks(2, lambda at: made[2 * at].execute_barrier())
    for outcome in outcomes:
        assert isinstance(outcome, CheckpointException)
        assert outcome.kind == "timeout"
        assert list(outcome.failures) == [1]
        assert "rank 1" in str(outcome)
        assert "barrier" in str(outcome)
    # Who comes late is told, and the next barrier is a new one.
    late = on_ranks(1, lambda _: made[1].execute_barrier())[0]
    assert isinstance(late, CheckpointException)
    assert on_ranks(3, lambda rank: made[rank].execute_barrier()) == [None] * 3


def test_a_missing_rank_0_is_named() -> None:
    made = barriers(2, timeout_secs=0.3)
    outcome = on_ranks(1, lambda _: made[1].execute_barrier())[0]
    assert isinstance(outcome, CheckpointException)
    assert (outcome.kind, list(outcome.failures)) == ("timeout", [0])


def test_a_store_that_is_not_there_is_named() -> None:
    port = free_port()
    with pytest.raises(CoordinationError, match=f"localhost:{port}") as caught:
        TCPStoreBarrier(1, 2, **tcp_args(port, timeout_barrier_init_secs=0.2))
    assert caught.value.kind == "store_lost"


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with pytest.raises(CoordinationError, match=f"hosted at localhost:{port}") as caught:
            TCPStoreBarrier(0, 2, **tcp_args(port))
    assert caught.value.kind == "store_lost"


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        RankInfo(rank, world_size)
