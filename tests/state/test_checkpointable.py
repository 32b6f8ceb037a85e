"""Values with torch's ``_Checkpointable`` methods, their items in torch's classes and in others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from dcp_engine.plan import TensorWriteData, WriteItem, WriteItemType
from dcp_engine.state.adapters import GroupRanks, describe
from dcp_engine.state.values import Box, EntryKind, ObjectValue, TensorValue
from tests.meshes import dtensor_on, mesh_seen_by
from tests.torch_features import EMPTY_SHARDS_WRAPPER

GROUP = GroupRanks(ranks=(0, 1), rank=1)


def describe_w(value: Any, **kwargs: Any) -> list[Any]:
    return describe("w", value, kind=EntryKind.REPLICATED, group=GROUP, **kwargs)


@pytest.mark.parametrize("for_load", [False, True])
def test_torchs_own_shards_wrapper_in_a_dtensor(for_load: bool) -> None:
    shards = [torch.ones(4, 2, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16)]
    wrapper = LocalShardsWrapper(shards, [(0, 3), (4, 0)])
    value = dtensor_on(mesh_seen_by(1, [0, 1]), [Shard(0)], wrapper, [8, 5])
    (result,) = describe_w(value, for_load=for_load)
    assert isinstance(result, TensorValue)
    assert (result.kind, result.shape) == (EntryKind.SHARDED, (8, 5))
    assert result.dtype == torch.bfloat16
    assert result.boxes == (Box(offsets=(0, 3), sizes=(4, 2)), Box(offsets=(4, 0), sizes=(4, 3)))
    assert [t.data_ptr() for t in result.tensors] == [s.data_ptr() for s in shards]


@pytest.mark.skipif(not EMPTY_SHARDS_WRAPPER, reason="this torch has no wrapper without shards")
@pytest.mark.parametrize("for_load", [False, True])
def test_a_rank_with_nothing_says_nothing(for_load: bool) -> None:
    value = dtensor_on(mesh_seen_by(1, [0, 1]), [Shard(0)], LocalShardsWrapper([], []), [8])
    assert describe_w(value, for_load=for_load) == []


class Halves:
    """Not a tensor: two halves of a (4,) tensor, described with items of a given make."""

    def __init__(self, classes: str, **wrong: Any) -> None:
        self.parts = [torch.ones(2), torch.ones(2)]
        self.classes = classes
        self.wrong = wrong

    def chunk(self, i: int) -> Any:
        sizes = self.wrong.get("sizes", torch.Size([2]))
        if self.classes == "ours":
            return ChunkStorageMetadata(offsets=torch.Size([2 * i]), sizes=sizes)
        return SimpleNamespace(offsets=(2 * i,), sizes=tuple(sizes))

    def __create_write_items__(self, fqn: str, obj: Any) -> list[Any]:
        assert obj is self
        items = []
        for i in range(2):
            size = torch.Size([4 + i * self.wrong.get("grow", 0)])
            index = MetadataIndex(fqn + self.wrong.get("suffix", ""), (2 * i,), i)
            properties = TensorProperties(dtype=torch.float32)
            if self.classes == "ours":
                data: Any = TensorWriteData(self.chunk(i), properties, size)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            else:
                data = SimpleNamespace(chunk=self.chunk(i), properties=properties, size=size)
                items.append(SimpleNamespace(index=index, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[Any]:
        return [self.chunk(i) for i in range(2)]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        return self.parts[index.offset[0] // 2]


@pytest.mark.parametrize("for_load", [False, True])
@pytest.mark.parametrize("classes", ["ours", "look-alikes"])
def test_items_of_any_class(classes: str, for_load: bool) -> None:
    value = Halves(classes)
    (result,) = describe_w(value, for_load=for_load)
    assert (result.fqn, result.shape, result.dtype) == ("w", (4,), torch.float32)
    assert [box.offsets for box in result.boxes] == [(0,), (2,)]
    assert [t.data_ptr() for t in result.tensors] == [t.data_ptr() for t in value.parts]


def test_items_may_carry_names_of_their_own() -> None:
    (result,) = describe_w(Halves("ours", suffix=".half"))
    assert result.fqn == "w.half"


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"sizes": torch.Size([1])}, "gives"), ({"grow": 1}, "disagree about the global shape")],
)
def test_contradictions_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedStateError, match=match) as info:
        describe_w(Halves("ours", **wrong))
    assert (info.value.tensor, info.value.rank) == ("w", 1)


def test_several_dtypes_are_refused() -> None:
    value = Halves("ours")
    value.parts[1] = value.parts[1].double()
    with pytest.raises(UnsupportedStateError, match="dtypes"):
        describe_w(value)


class AsBytes:
    def __create_write_items__(self, fqn: str, obj: Any) -> list[Any]:
        return [WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)]


@pytest.mark.parametrize("for_load", [False, True])
def test_bytes_items_make_an_object(for_load: bool) -> None:
    value = AsBytes()
    expected = [ObjectValue(fqn="w", kind=EntryKind.REPLICATED, value=value)]
    assert describe_w(value, for_load=for_load) == expected


def test_a_destination_needs_the_other_methods() -> None:
    for missing in ("__create_chunk_list__", "__get_tensor_shard__"):
        methods = {
            name: getattr(Halves, name)
            for name in dir(Halves)
            if name not in (missing, "__dict__", "__weakref__")
        }
        value = type("Lacking", (), methods)("ours")
        with pytest.raises(UnsupportedStateError, match=missing):
            describe_w(value, for_load=True)


def test_not_under_per_rank() -> None:
    with pytest.raises(UnsupportedStateError, match="PerRank"):
        describe("w", Halves("ours"), kind=EntryKind.PER_RANK, group=GROUP)
