"""What a checkpoint holds, in the classes that torch's DCP uses: keys, shapes, chunks.

Belongs here: plain data classes that planners, writers and readers of any origin exchange.
Does not belong here: the engine's own column classes (``planning.columns``) and anything that
reads or writes bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcp_engine.stateful import Stateful

__all__ = [
    "STATE_DICT_TYPE",
    "STORAGE_TYPES",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
]


@dataclass
class ChunkStorageMetadata:
    """A box of a tensor: where it begins and how far it goes, in elements per dimension."""

    offsets: torch.Size
    sizes: torch.Size


# torch.memory_format objects cannot be pickled; these names stand for them.
_MEMORY_FORMATS: dict[str, torch.memory_format] = {
    "contiguous_format": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve_format": torch.preserve_format,
}


@dataclass
class TensorProperties:
    """Properties of a tensor. Only ``dtype`` matters to a checkpoint; the rest is torch's."""

    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    layout: torch.layout = torch.strided
    requires_grad: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    pin_memory: bool = False

    def __getstate__(self) -> tuple[Any, ...]:
        for name, value in _MEMORY_FORMATS.items():
            if self.memory_format == value:
                return (self.dtype, self.layout, self.requires_grad, name, self.pin_memory)
        raise ValueError(f"memory format {self.memory_format} has no stored name")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype, self.layout, self.requires_grad, name, self.pin_memory = state
        self.memory_format = _MEMORY_FORMATS[name]

    @staticmethod
    def create_from_tensor(tensor: torch.Tensor) -> TensorProperties:
        """Describe ``tensor``."""
        return TensorProperties(
            dtype=tensor.dtype,
            layout=tensor.layout,
            requires_grad=tensor.requires_grad,
            memory_format=torch.contiguous_format,
            pin_memory=tensor.is_pinned() if tensor.device.type == "cpu" else False,
        )


@dataclass
class TensorStorageMetadata:
    """A stored tensor: its properties, global shape and the chunks that tile it."""

    properties: TensorProperties
    size: torch.Size
    chunks: list[ChunkStorageMetadata]


@dataclass
class BytesStorageMetadata:
    """A stored value that is not a tensor."""


STORAGE_TYPES = TensorStorageMetadata | BytesStorageMetadata
STATE_DICT_TYPE = dict[str, Stateful | Any]


@dataclass
class StorageMeta:
    """What a storage layer says of itself to planners."""

    checkpoint_id: str | os.PathLike[str] | None = None
    save_id: str | None = None
    load_id: str | None = None
    modules: list[str] = field(default_factory=list)


@dataclass
class Metadata:
    """The content of a checkpoint.

    ``state_dict_metadata`` maps each fully qualified name to what is stored under it;
    ``planner_data`` is the planner's (the default planner: name to path in the state dict);
    ``storage_data`` is the storage layer's.
    """

    state_dict_metadata: Mapping[str, STORAGE_TYPES]
    planner_data: Any = None
    storage_data: Any = None
    storage_meta: StorageMeta | None = None
    version: str | None = None


@dataclass(frozen=True)
class MetadataIndex:
    """The key of one stored item: name, and for a chunk of a tensor its offset.

    ``index`` is a hint, the position in the tensor's list of chunks; it takes no part in
    comparison or hashing.
    """

    fqn: str
    offset: torch.Size | None = None
    index: int | None = field(hash=False, compare=False, default=None)

    def __init__(
        self, fqn: str, offset: Sequence[int] | None = None, index: int | None = None
    ) -> None:
        object.__setattr__(self, "fqn", fqn)
        object.__setattr__(self, "offset", None if offset is None else torch.Size(offset))
        object.__setattr__(self, "index", index)
