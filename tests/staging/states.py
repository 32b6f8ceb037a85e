"""State dicts with values of every kind, for one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from dcp_engine.metadata import ChunkStorageMetadata, MetadataIndex
from dcp_engine.metadata import TensorProperties as OwnProperties
from dcp_engine.plan import TensorWriteData, WriteItem, WriteItemType
from tests.meshes import mesh_seen_by

RANK = 1


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements in order, of a tensor of any dtype and strides."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.numel():
        return b""
    size = plain.element_size()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if size in integers:
        plain = plain.view(integers[size])
    # A copy: numpy makes the storages it sees unresizable.
    return plain.clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).to(dtype)


def mesh_of(ranks: Any, rank: int = RANK) -> DeviceMesh:
    return mesh_seen_by(rank, ranks)


def dtensor(
    local: torch.Tensor, shape: tuple[int, ...], *placements: Placement, ranks: Any = (0, 1)
) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local,
        mesh_of(ranks),
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def sharded_tensor(tensors: Mapping[int, Any], others: Mapping[int, int], rows: int) -> Any:
    """``tensors``: this rank's, (n, 3), by row offset; ``others``: sizes by offset. Needs a
    process group."""

    def metadata(offset: int, size: int, rank: int) -> ShardMetadata:
        return ShardMetadata([offset, 0], [size, 3], f"rank:{rank}/cpu")

    local = [LocalShard(t, metadata(o, t.shape[0], RANK)) for o, t in tensors.items()]
    everything = [s.metadata for s in local] + [metadata(o, n, 0) for o, n in others.items()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local,
        ShardedTensorMetadata(
            shards_metadata=everything,
            size=torch.Size([rows, 3]),
            tensor_properties=TensorProperties(dtype=torch.float32),
        ),
    )


class Halves:
    """Not a tensor, but it describes itself: two halves of a (4,) tensor."""

    def __init__(self, suffixes: tuple[str, str] = ("", "")) -> None:
        self.parts = [numbered(2), numbered(2) + 10]
        self.suffixes = suffixes

    def chunk(self, i: int) -> ChunkStorageMetadata:
        offset = 0 if self.suffixes[0] != self.suffixes[1] else 2 * i
        return ChunkStorageMetadata(offsets=torch.Size([offset]), sizes=torch.Size([2]))

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        size = torch.Size([4 if self.suffixes[0] == self.suffixes[1] else 2])
        return [
            WriteItem(
                MetadataIndex(fqn + self.suffixes[i], self.chunk(i).offsets, i),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    self.chunk(i), OwnProperties(dtype=torch.float32), size
                ),
            )
            for i in range(2)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self.chunk(i) for i in range(2)]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        if self.suffixes[0] != self.suffixes[1]:
            return self.parts[int(index.fqn.endswith(self.suffixes[1]))]
        return self.parts[index.offset[0] // 2]


class Opaque:
    """An object like any other, that holds a tensor."""

    def __init__(self) -> None:
        self.tensor = numbered(3)
        self.items = [1, 2]


class Counter:
    """Stateful."""

    def __init__(self) -> None:
        self.value = numbered(2)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "steps": 3}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]
