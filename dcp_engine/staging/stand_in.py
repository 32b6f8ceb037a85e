"""``StagedShards``: what a staged state dict holds in place of a sharded tensor.

It carries what the original said of itself (names, boxes, dtype, global shape) and this rank's
shards as staged memory, and speaks through torch's ``_Checkpointable`` methods, which planners of
any origin know. It needs no mesh and no process group, so that it can live in another process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace

from dcp_engine.errors import UsageError
from dcp_engine.metadata import ChunkStorageMetadata
from dcp_engine.plan import WriteItem
from dcp_engine.planning.items import value_items
from dcp_engine.state.values import Box, TensorValue

__all__ = ["StagedShards"]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A described tensor, and what its name has behind the name of the value it belongs to."""

    suffix: str
    value: TensorValue


class StagedShards(torch.Tensor):
    """A sharded tensor's shards on this rank, staged.

    A tensor by type, shape and dtype, so that nothing else is made of the containers around it;
    but it has no operations: ``local_tensors`` has the memory.
    """

    _parts: tuple[_Part, ...]

    # No operation can mean anything here; without this, torch would try.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        requires_grad: bool,
        parts: Sequence[tuple[str, TensorValue]],
    ) -> StagedShards:
        """Make one.

        Args:
            shape: of the whole tensor.
            parts: the described values, their tensors staged; each with the part of its name that
                follows the name of the original (nearly always nothing).
        """
        made: StagedShards = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("cpu"), requires_grad=requires_grad
        )
        made._parts = tuple(_Part(suffix=suffix, value=value) for suffix, value in parts)
        return made

    @property
    def local_tensors(self) -> tuple[torch.Tensor, ...]:
        """The staged memory of every shard."""
        return tuple(tensor for part in self._parts for tensor in part.value.tensors)

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        """What a save writes of it under the name ``fqn``."""
        return [
            item
            for part in self._parts
            for item in value_items(replace(part.value, fqn=fqn + part.suffix))
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """The boxes of its shards."""
        return [
            ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
            for part in self._parts
            for box in part.value.boxes
        ]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        """The staged memory of the shard that ``index`` (a ``MetadataIndex``) names."""
        found = [(part, *shard) for part in self._parts for shard in _shards(part.value)]
        named = [
            entry for entry in found if entry[0].suffix and index.fqn.endswith(entry[0].suffix)
        ]
        for _, box, tensor in named or found:
            if index.offset is None or box.offsets == tuple(index.offset):
                return tensor
        raise UsageError(
            f"no shard of this rank lies at {None if index.offset is None else list(index.offset)}",
            tensor=index.fqn,
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: only the shards have values."""
        raise UsageError(
            f"{func} was called on a staged sharded tensor, which holds this rank's shards only",
            hint="take them from __get_tensor_shard__ or local_tensors",
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = [(part.suffix, part.value) for part in self._parts]
        return StagedShards, (tuple(self.shape), self.dtype, self.requires_grad, parts)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        boxes = [part.value.boxes for part in self._parts]
        return f"StagedShards(shape={tuple(self.shape)}, dtype={self.dtype}, boxes={boxes})"


def _shards(value: TensorValue) -> Iterator[tuple[Box, torch.Tensor]]:
    yield from zip(value.boxes, value.tensors, strict=True)
