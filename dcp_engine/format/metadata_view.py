"""A manifest in torch's vocabulary: ``Metadata``, without making a million chunk objects.

Belongs here: the lazy read-only mappings over a manifest. Does not belong here: reading one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from dcp_engine.format.manifest import Manifest, StoredTensor
from dcp_engine.format.nesting import Path
from dcp_engine.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

__all__ = ["ManifestMetadata"]


class _Source:
    """A manifest, or how to get one: asked for once, at the first look."""

    def __init__(self, load: Callable[[], Manifest]) -> None:
        self._load = load

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest."""
        return self._load()


class _Entries(Mapping[str, STORAGE_TYPES]):
    """Fully qualified name to what is stored under it. A per-rank value is described as the
    lowest rank stored it."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def __getitem__(self, name: str) -> STORAGE_TYPES:
        manifest = self._source.manifest
        if name in manifest.tensors:
            return _describe(manifest.tensors[name])
        if name in manifest.objects:
            return BytesStorageMetadata()
        tensors = manifest.per_rank_tensors.get(name, {})
        objects = manifest.per_rank_objects.get(name, {})
        if not tensors and not objects:
            raise KeyError(name)
        lowest = min([*tensors, *objects])
        return _describe(tensors[lowest]) if lowest in tensors else BytesStorageMetadata()

    def __iter__(self) -> Iterator[str]:
        manifest = self._source.manifest
        yield from manifest.tensors
        yield from manifest.objects
        yield from manifest.per_rank_tensors
        yield from (n for n in manifest.per_rank_objects if n not in manifest.per_rank_tensors)

    def __len__(self) -> int:
        manifest = self._source.manifest
        shared = len(manifest.tensors) + len(manifest.objects)
        return shared + len({*manifest.per_rank_tensors, *manifest.per_rank_objects})

    def __contains__(self, name: object) -> bool:
        manifest = self._source.manifest
        return (
            name in manifest.tensors
            or name in manifest.objects
            or name in manifest.per_rank_tensors
            or name in manifest.per_rank_objects
        )


class _Paths(Mapping[str, Path]):
    """Fully qualified name to its path in the state dict."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Path:
        return self._source.manifest.nesting.paths()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.manifest.nesting.paths())

    def __len__(self) -> int:
        return len(self._source.manifest.nesting.paths())


class ManifestMetadata(Metadata):
    """``Metadata`` whose mappings are made from a manifest as they are looked at.

    Make it with ``of`` or ``lazily``. ``planner_data`` maps each name to its path. Pickles, and
    copies, as a plain ``Metadata`` of plain dicts.
    """

    @classmethod
    def of(cls, manifest: Manifest, storage_meta: StorageMeta | None = None) -> ManifestMetadata:
        """The metadata of ``manifest``."""
        return cls.lazily(lambda: manifest, storage_meta)

    @classmethod
    def lazily(
        cls, load: Callable[[], Manifest], storage_meta: StorageMeta | None = None
    ) -> ManifestMetadata:
        """The metadata of the manifest that ``load`` returns; it is called at the first look, at
        most once unless it raises."""
        source = _Source(load)
        return cls(
            state_dict_metadata=_Entries(source),
            planner_data=_Paths(source),
            storage_meta=storage_meta,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        planner_data = self.planner_data
        if isinstance(planner_data, Mapping):
            planner_data = dict(planner_data)
        return Metadata, (
            dict(self.state_dict_metadata),
            planner_data,
            self.storage_data,
            self.storage_meta,
            self.version,
        )


def _describe(tensor: StoredTensor) -> TensorStorageMetadata:
    chunks = tensor.chunks
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=tensor.dtype),
        size=torch.Size(tensor.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in zip(chunks.offsets.tolist(), chunks.sizes.tolist(), strict=True)
        ],
    )
