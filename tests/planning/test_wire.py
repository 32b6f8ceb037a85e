"""Plans survive the wire; damaged messages are refused by name."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import CoordinationError
from dcp_engine.planning.balance import BalanceOptions
from dcp_engine.planning.columns import LocalPlan
from dcp_engine.planning.global_plan import assignments, make_global_plan
from dcp_engine.planning.packing import Packed, pack, unpack
from dcp_engine.planning.wire import (
    decode_assignment,
    decode_local_plan,
    decode_local_plans,
    encode_assignment,
    encode_local_plan,
)
from dcp_engine.state.values import Value
from tests.planning.layouts import local_plans, obj, replicated, sharded, source, states


def same(one: object, two: object) -> bool:
    if isinstance(one, np.ndarray):
        assert isinstance(two, np.ndarray)
        return one.dtype == two.dtype and np.array_equal(one, two)
    if dataclasses.is_dataclass(one):
        return all(
            same(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(one)
        )
    return one == two


@settings(max_examples=60, deadline=None)
@given(states())
def test_plans_and_assignments_round_trip(ranks: list[list[Value]]) -> None:
    plans = local_plans(ranks)
    messages = [encode_local_plan(plan) for plan in plans]
    decoded = decode_local_plans(messages)
    assert all(same(a, b) for a, b in zip(plans, decoded, strict=True))
    assert messages == [encode_local_plan(plan) for plan in decoded]
    plan = make_global_plan(
        decoded, coordinator_rank=0, balance=BalanceOptions(finest=1, coarsest=8)
    )
    for own, mine in zip(plans, assignments(plan, decoded), strict=True):
        assert same(decode_assignment(encode_assignment(mine, own), own), mine)


def test_equal_tables_are_decoded_once_and_shared() -> None:
    ranks: list[list[Value]] = [[sharded("w", (8, 4), r, [4], [0]), obj("o")] for r in range(4)]
    decoded = decode_local_plans([encode_local_plan(plan) for plan in local_plans(ranks)])
    assert all(plan.tensors is decoded[0].tensors for plan in decoded)


def test_a_regular_plan_is_small() -> None:
    values: list[Value] = [
        sharded(f"model.layers.{i}.attention.{n}.weight", (640, 320), 3, [64], [0])
        for i in range(100)
        for n in ("wq", "wk", "wv", "wo")
    ]
    plan = source(values, 3).plan
    message = encode_local_plan(plan)
    assert len(message) < 800
    plans = [source([*values], 3).plan]
    assert same(decode_local_plan(message), plans[0])


def test_irregular_boxes_round_trip() -> None:
    plan = source([sharded("w", (7, 5), 2, [3], [0]), replicated("b", ())], 2).plan
    chunks = dataclasses.replace(
        plan.chunks,
        offsets=np.array([[3, 1], [0, 0]], np.int64),
        sizes=np.array([[3, 3], [1, 1]], np.int64),
    )
    odd = dataclasses.replace(plan, chunks=chunks)
    assert same(decode_local_plan(encode_local_plan(odd)), odd)


def message() -> tuple[LocalPlan, bytes]:
    plan = source([sharded("w", (8, 4), 1, [4], [0]), obj("o")], 1).plan
    return plan, encode_local_plan(plan)


@pytest.mark.parametrize("damage", [b"", b"\x90", b"\xc1", b"\x95\x01\x02\x03\x04\x05"])
def test_what_is_no_plan_is_refused(damage: bytes) -> None:
    with pytest.raises(CoordinationError) as caught:
        decode_local_plan(damage)
    assert caught.value.kind == "out_of_step"


def test_another_version_is_refused_by_number() -> None:
    _, data = message()
    fields = msgspec.msgpack.decode(data)
    fields[0] = 99
    with pytest.raises(CoordinationError, match="version 99"):
        decode_local_plan(msgspec.msgpack.encode(fields))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_refused_or_still_a_valid_plan(data: st.DataObject) -> None:
    _, raw = message()
    at = data.draw(st.integers(0, len(raw) - 1))
    bad = bytearray(raw)
    bad[at] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode_local_plan(bytes(bad))
    except CoordinationError:
        return
    assert len(decoded.chunks.tensor) == len(decoded.chunks.offsets)


def test_an_assignment_for_another_plan_is_refused() -> None:
    big: list[Value] = [replicated(f"t{i}", (4, 4)) for i in range(5)]
    plans = local_plans([big])
    mine = next(assignments(make_global_plan(plans, coordinator_rank=0), plans))
    data = encode_assignment(mine, plans[0])
    with pytest.raises(CoordinationError, match="does not fit"):
        decode_assignment(data, source([replicated("t0", (4, 4))]).plan)
    with pytest.raises(CoordinationError):
        decode_assignment(b"\x00", plans[0])


@given(st.lists(st.tuples(st.lists(st.integers(-(2**62), 2**62)), st.booleans()), max_size=4))
def test_packed_arrays_round_trip(columns: list[tuple[list[int], bool]]) -> None:
    arrays = [(np.array(values, np.int64), flag) for values, flag in columns]
    packed = pack(arrays, level=1)
    for (array, _), back in zip(arrays, unpack(packed, len(arrays)), strict=True):
        assert np.array_equal(array, back)


def test_announced_lengths_bound_what_is_decompressed() -> None:
    bomb = pack([(np.zeros(1_000_000, np.int64), False)], level=9)
    with pytest.raises(CoordinationError, match="announced"):
        unpack(Packed(types=bomb.types, counts=[10], data=bomb.data), 1)
    with pytest.raises(CoordinationError, match="announced"):
        unpack(Packed(types=bomb.types, counts=[1 << 40], data=bomb.data), 1)


def test_dtype_is_kept() -> None:
    plan = source([replicated("w", (2,), dtype=torch.bfloat16)]).plan
    assert same(decode_local_plan(encode_local_plan(plan)), plan)
