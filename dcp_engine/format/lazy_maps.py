"""Read-only mappings from names to what a manifest stores under them.

Belongs here: sorting rows into shared and per-rank names, refusing names that are there twice,
and making ``StoredTensor`` objects when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from dcp_engine.format.json_columns import refuse
from dcp_engine.format.stored import NO_OWNER, StoredObject, StoredTensor
from dcp_engine.format.tensor_section import TensorSectionReader, TiledTensors, WholeTensors

__all__ = ["LazyMap", "TensorMap", "make_object_maps", "make_tensor_maps"]

K = TypeVar("K")
A = TypeVar("A")
V = TypeVar("V")


class LazyMap(Mapping[K, V], Generic[K, A, V]):
    """A mapping whose values are made from ``sources`` by ``make``, once each."""

    def __init__(self, sources: Mapping[K, A], make: Callable[[A], V]) -> None:
        self._sources = sources
        self._make = make
        self._made: dict[K, V] = {}

    def __getitem__(self, key: K) -> V:
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._make(self._sources[key])
        return made

    def __iter__(self) -> Iterator[K]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, key: object) -> bool:
        return key in self._sources


class TensorMap(LazyMap[str, int, StoredTensor]):
    """The shared tensors of one section, by name."""

    def __init__(self, rows: Mapping[str, int], section: TensorSectionReader) -> None:
        super().__init__(rows, section.tensor)
        self._section = section

    def whole(self, names: Sequence[str]) -> WholeTensors:
        """Those of ``names`` that are one chunk each, as columns and without an object for each;
        ``at`` counts in ``names``. The others have to be looked up one by one."""
        return self._section.whole(self._rows(names))

    def tiled(self, names: Sequence[str]) -> Iterator[TiledTensors]:
        """Those of ``names`` that are a few chunks each, likewise, in parts."""
        return self._section.tiled(self._rows(names))

    def _rows(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        return np.array([self._sources.get(name, -1) for name in names], np.int64)


TensorMaps = tuple[Mapping[str, StoredTensor], Mapping[str, Mapping[int, StoredTensor]]]
ObjectMaps = tuple[Mapping[str, StoredObject], Mapping[str, Mapping[int, StoredObject]]]


def make_tensor_maps(section: TensorSectionReader, world_size: int) -> TensorMaps:
    """Shared and per-rank tensors by name. Raises ``DamagedCheckpointError`` for a name twice."""
    owned = zip(section.names, section.owners, range(len(section)), strict=True)
    shared, per_rank = _split(owned, world_size)
    return TensorMap(shared, section), MappingProxyType(
        {name: LazyMap(rows, section.tensor) for name, rows in per_rank.items()}
    )


def make_object_maps(entries: Iterable[StoredObject], world_size: int) -> ObjectMaps:
    """Shared and per-rank objects by name. Raises ``DamagedCheckpointError`` for a name twice."""
    owned = ((entry.name, entry.owner, entry) for entry in entries)
    shared, per_rank = _split(owned, world_size)
    return MappingProxyType(shared), MappingProxyType(
        {name: MappingProxyType(by_rank) for name, by_rank in per_rank.items()}
    )


def _split(
    owned: Iterable[tuple[str, int, A]], world_size: int
) -> tuple[dict[str, A], dict[str, dict[int, A]]]:
    shared: dict[str, A] = {}
    per_rank: dict[str, dict[int, A]] = {}
    for name, owner, value in owned:
        if owner == NO_OWNER:
            if name in shared:
                refuse("the name is there twice", tensor=name)
            shared[name] = value
            continue
        if not 0 <= owner < world_size:
            refuse(f"it belongs to rank {owner} of {world_size}", tensor=name)
        by_rank = per_rank.setdefault(name, {})
        if owner in by_rank:
            refuse(f"the name is there twice for rank {owner}", tensor=name)
        by_rank[owner] = value
    both = shared.keys() & per_rank.keys()
    if both:
        refuse("it is shared and per rank at once", tensor=min(both))
    return shared, per_rank
