"""Where a device mesh lies in the process group of an operation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dcp_engine.state.adapters.group import GroupRanks
from dcp_engine.state.placements import coordinates

__all__ = ["MeshPlace", "Meshes"]


@dataclass(frozen=True, kw_only=True)
class MeshPlace:
    """A mesh in terms of the group's ranks."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...] | None
    """The mesh row by row; None without a group, or if it reaches outside."""
    outside: tuple[int, ...]
    """Global ranks of the mesh that are not in the group."""
    coordinate: tuple[int, ...] | None
    """Of this rank; None if it is not in the mesh."""

    def permuted(self, order: tuple[int, ...]) -> MeshPlace:
        """The same mesh with its dimensions in another order."""
        ranks = self.ranks
        if ranks is not None:
            grid = np.asarray(ranks, np.int64).reshape(self.shape).transpose(order)
            ranks = tuple(grid.reshape(-1).tolist())
        coordinate = self.coordinate
        return MeshPlace(
            shape=tuple(self.shape[d] for d in order),
            ranks=ranks,
            outside=self.outside,
            coordinate=None if coordinate is None else tuple(coordinate[d] for d in order),
        )


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """The meshes met while one state dict is described. A model has thousands of ``DTensor``
    and few meshes, and listing a mesh's ranks takes a hundred times as long as looking it up."""

    group: GroupRanks
    _known: dict[int, tuple[Any, MeshPlace]] = field(default_factory=dict)
    """By id; the mesh is held, so that its id stays its own."""
    readings: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """For ``dtensor``: what was made of a mesh (by id; one that was looked up here), a global
    shape, a local shape and placements. The tensors of a model share a few of them."""

    def place(self, mesh: Any) -> MeshPlace:
        """Where ``mesh`` (a ``DeviceMesh``) lies."""
        if id(mesh) not in self._known:
            self._known[id(mesh)] = (mesh, _place(mesh, self.group))
        return self._known[id(mesh)][1]


def _place(mesh: Any, group: GroupRanks) -> MeshPlace:
    shape = tuple(int(n) for n in mesh.mesh.shape)
    if group.ranks is None:
        mine = mesh.get_coordinate()
        coordinate = None if mine is None else tuple(int(c) for c in mine)
        return MeshPlace(shape=shape, ranks=None, outside=(), coordinate=coordinate)
    members: list[int] = mesh.mesh.flatten().tolist()
    number = {rank: i for i, rank in enumerate(group.ranks)}
    outside = tuple(sorted(set(members) - number.keys()))
    if outside:
        return MeshPlace(shape=shape, ranks=None, outside=outside, coordinate=None)
    ranks = tuple(number[rank] for rank in members)
    where = dict(zip(ranks, coordinates(shape), strict=True))
    return MeshPlace(shape=shape, ranks=ranks, outside=(), coordinate=where.get(group.rank))
