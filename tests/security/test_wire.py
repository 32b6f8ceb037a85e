"""What ranks send each other cannot make a message of kilobytes into gigabytes of memory."""

from __future__ import annotations

import tracemalloc
import zlib

import msgspec
import numpy as np
import pytest

from dcp_engine.errors import CoordinationError
from dcp_engine.planning.global_plan import assignments, make_global_plan
from dcp_engine.planning.packing import Packed, inflate, pack, unpack
from dcp_engine.planning.wire import decode_assignment, decode_local_plan, encode_assignment
from dcp_engine.planning.wire import encode_local_plan as encode_plan
from tests.planning.layouts import local_plans, replicated

MIB = 1 << 20
BOMB = zlib.compress(bytes(64 * MIB), 9)
"""64 MiB in 64 KiB."""


def refused(call: object, most: int = 4 * MIB) -> None:
    """``call`` is refused, and takes little memory for that."""
    assert callable(call)
    tracemalloc.start()
    try:
        with pytest.raises(CoordinationError) as caught:
            call()
        assert caught.value.kind == "out_of_step"
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("limit", [-(1 << 63), -2, -1, 0, 1000, MIB, (1 << 31) + 1, 1 << 62])
def test_no_more_is_inflated_than_was_announced(limit: int) -> None:
    refused(lambda: inflate(BOMB, limit))


@pytest.mark.parametrize("size", [-2, -1, 0, 1000, 1 << 40])
def test_a_table_that_inflates(size: int) -> None:
    frame = msgspec.msgpack.decode(encode_plan(local_plans([[replicated("w", (4,))]])[0]))
    frame[2:4] = [size, BOMB]
    data = msgspec.msgpack.encode(frame)
    refused(lambda: decode_local_plan(data))


@pytest.mark.parametrize("count", [-1, 1000, (1 << 28) + 1, 1 << 31, 1 << 62])
def test_columns_that_inflate(count: int) -> None:
    """One byte for each number on the wire is eight in memory: that is what is bounded."""
    refused(lambda: unpack(Packed(types=b"\0", counts=[count], data=BOMB), 1))


@pytest.mark.parametrize("owner", [-2, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
def test_values_of_a_rank_that_cannot_be(owner: int) -> None:
    frame = msgspec.msgpack.decode(encode_plan(local_plans([[replicated("w", (4,))]])[0]))
    frame[1] = owner
    data = msgspec.msgpack.encode(frame)
    refused(lambda: decode_local_plan(data))


@pytest.mark.parametrize(
    ("within", "size"),
    [(0, 0), (0, -4), (-1, 2), (0, 5), (4, 1), (1 << 62, 1 << 62), ((1 << 63) - 1, 1)],
)
def test_an_assigned_box_outside_the_tensor(within: int, size: int) -> None:
    """Also where begin and size add up to a number that wraps."""
    plans = local_plans([[replicated("w", (4,))]])
    mine = next(assignments(make_global_plan(plans, coordinator_rank=0), plans))
    frame = msgspec.msgpack.decode(encode_assignment(mine, plans[0]))
    good = unpack(msgspec.convert(frame[1], Packed, strict=False), 6)
    columns = [*good[:3], np.array([0]), np.array([within]), np.array([size])]
    packed = pack([(c, False) for c in columns], level=1)
    data = msgspec.msgpack.encode([frame[0], packed, frame[2]])
    refused(lambda: decode_assignment(data, plans[0]))
