"""ShardedTensors, flat and nested, on one rank of a fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.state.adapters import GroupRanks, describe
from dcp_engine.state.values import Box, EntryKind, TensorValue

RANK, WORLD = 1, 4


@pytest.fixture(scope="module", autouse=True)
def fake_group() -> Iterator[None]:
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


def metadata(offset: int, size: int, rank: int) -> ShardMetadata:
    return ShardMetadata([offset, 0], [size, 3], f"rank:{rank}/cpu")


def sharded(tensors: dict[int, Any], others: list[tuple[int, int]], rows: int) -> ShardedTensor:
    """``tensors``: this rank's, by row offset; ``others``: offset and size of the others'."""
    local = [Shard(tensor, metadata(o, tensor.shape[0], RANK)) for o, tensor in tensors.items()]
    everything = [s.metadata for s in local] + [metadata(o, n, 0) for o, n in others]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local,
        ShardedTensorMetadata(
            shards_metadata=everything,
            size=torch.Size([rows, 3]),
            tensor_properties=TensorProperties(dtype=torch.float32),
        ),
    )


def one(value: Any, **kwargs: Any) -> TensorValue:
    group = GroupRanks(ranks=tuple(range(WORLD)), rank=RANK)
    (result,) = describe("w", value, kind=EntryKind.REPLICATED, group=group, **kwargs)
    assert isinstance(result, TensorValue)
    return result


def test_local_shards_are_boxes() -> None:
    a, b = torch.ones(2, 3), torch.ones(1, 3)
    value = one(sharded({2: a, 7: b}, [(0, 2), (4, 3)], 8), for_load=True)
    assert (value.kind, value.shape, value.dtype) == (EntryKind.SHARDED, (8, 3), torch.float32)
    assert value.boxes == (Box(offsets=(2, 0), sizes=(2, 3)), Box(offsets=(7, 0), sizes=(1, 3)))
    assert [t.data_ptr() for t in value.tensors] == [a.data_ptr(), b.data_ptr()]


def test_a_rank_without_shards_has_no_boxes() -> None:
    value = one(sharded({}, [(0, 8)], 8))
    assert (value.boxes, value.shape, value.dtype) == ((), (8, 3), torch.float32)


def test_nested_ones_are_flattened_at_the_sum_of_offsets() -> None:
    part = torch.ones(2, 3)
    inner = sharded({2: part}, [(0, 2)], 4)
    outer = sharded({4: torch.ones(4, 3)}, [(0, 4)], 8)
    outer._local_shards[0].tensor = inner
    value = one(outer)
    assert value.boxes == (Box(offsets=(6, 0), sizes=(2, 3)),)
    assert value.tensors[0].data_ptr() == part.data_ptr()
    with pytest.raises(UnsupportedStateError, match="flatten_sharded_tensors"):
        one(outer, flatten_sharded_tensors=False)


def test_shards_must_be_what_their_metadata_says() -> None:
    value = sharded({0: torch.ones(4, 3)}, [(4, 4)], 8)
    value._local_shards[0].tensor = torch.ones(3, 3)
    with pytest.raises(UnsupportedStateError, match="metadata") as info:
        one(value)
    assert (info.value.tensor, info.value.rank) == ("w", RANK)


def test_bad_memory_is_refused() -> None:
    value = sharded({0: torch.ones(4, 3)}, [(4, 4)], 8)
    value._local_shards[0].tensor = torch.empty(4, 3, device="meta")
    with pytest.raises(UnsupportedStateError, match="meta"):
        one(value)
