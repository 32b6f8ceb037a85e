"""Planning costs a bit per rank and a bit per tensor in Python, and memory per chunk: counted, not
timed, because seconds depend on the machine."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dcp_engine.planning.global_plan import assignments, make_global_plan
from dcp_engine.planning.wire import (
    decode_local_plans,
    encode_assignment,
    encode_local_plan,
)
from dcp_engine.state.values import Value
from tests.planning.layouts import obj, replicated, sharded, source

Layout = Callable[[int, int], tuple[list[int], list[int | None]]]

LAYOUTS: dict[str, Layout] = {
    "first dimension": lambda world, number: ([world], [0]),
    "second dimension": lambda world, number: ([world], [1]),
    "grid": lambda world, number: ([4, world // 4], [0, 1]),
    "grid, columns first": lambda world, number: ([4, world // 4], [1, 0]),
    "replicas of shards": lambda world, number: ([2, world // 2], [None, 0]),
    "mixed": lambda world, number: ([world], [number % 2]),
}


def messages(world: int, tensors: int, layout: Layout) -> list[bytes]:
    result = []
    for rank in range(world):
        values: list[Value] = []
        for number in range(tensors):
            mesh, cuts = layout(world, number)
            values.append(
                sharded(f"layers.{number}.w", (128, 128), rank, mesh, cuts, dtype=torch.uint8)
            )
        values += [replicated(f"norms.{number}", (8,)) for number in range(tensors // 8)]
        values.append(obj("step"))
        result.append(encode_local_plan(source(values, rank).plan))
    return result


def plan_all(received: list[bytes]) -> list[bytes]:
    """All that the coordinator does."""
    plans = decode_local_plans(received)
    plan = make_global_plan(plans, coordinator_rank=0)
    parts = assignments(plan, plans)
    return [encode_assignment(part, own) for part, own in zip(parts, plans, strict=True)]


def count_calls(received: list[bytes]) -> int:
    calls = 0

    def profile(frame: Any, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        plan_all(received)
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("name", LAYOUTS)
def test_calls_grow_with_ranks_plus_tensors_not_with_their_product(name: str) -> None:
    layout = LAYOUTS[name]
    plan_all(messages(8, 8, layout))  # whatever is made at the first use
    few, many = (16, 16), (64, 64)
    counts = {
        (world, tensors): count_calls(messages(world, tensors, layout))
        for world in (few[0], many[0])
        for tensors in (few[1], many[1])
    }
    together = counts[many] - counts[many[0], few[1]] - counts[few[0], many[1]] + counts[few]
    # 48 ranks times 48 tensors more: a call for each would be 2,304.
    assert abs(together) < 250


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_grows_with_chunks(name: str) -> None:
    layout = LAYOUTS[name]

    def peak(world: int, tensors: int) -> int:
        received = messages(world, tensors, layout)
        tracemalloc.start()
        try:
            plan_all(received)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    plan_all(messages(8, 8, layout))
    small, large = peak(32, 64), peak(64, 128)
    assert large <= 4.4 * small
