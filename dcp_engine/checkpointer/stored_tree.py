"""What a checkpoint holds for one rank, nested as it was saved.

Belongs here: reading a manifest as a tree. Does not belong here: what somebody asks for
(``requests``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from dcp_engine.errors import StateMismatchError
from dcp_engine.format.manifest import Manifest, StoredTensor
from dcp_engine.state.adapters import FLATTEN_KEY

__all__ = ["StoredBranch", "StoredLeaf", "StoredNode", "stored_tree"]

Key = str | int
ContainerKind = Literal["dict", "list", "tuple"]


@dataclass(frozen=True, kw_only=True)
class StoredLeaf:
    """A value."""

    name: str
    tensor: StoredTensor | None
    """None for an object."""
    is_example: bool = False
    """Other ranks saved a value each, of which this is one."""


@dataclass(kw_only=True)
class StoredBranch:
    """A container."""

    kind: str
    children: dict[Key, StoredNode] = field(default_factory=dict)
    """For lists and tuples by position; some positions may belong to other ranks."""

    @property
    def is_wrapper(self) -> bool:
        """Whether these are the parts of a tensor subclass."""
        return FLATTEN_KEY in self.children


StoredNode = StoredLeaf | StoredBranch


def stored_tree(manifest: Manifest, rank: int, world_size: int) -> StoredBranch:
    """All values that ``rank`` has a part in; of another number of ranks, all that there are."""
    root = StoredBranch(kind="dict")
    containers = manifest.nesting.containers()
    paths = manifest.nesting.paths()
    # What a planner of another origin named without nesting it lies at the top.
    own = {name: (name,) for name in _names(manifest) if name not in paths}
    for name, path in (*paths.items(), *own.items()):
        leaf = _leaf(manifest, name, rank, world_size)
        if leaf is None:
            continue
        branch = root
        for depth in range(1, len(path)):
            below = branch.children.get(path[depth - 1])
            if not isinstance(below, StoredBranch):
                below = StoredBranch(kind=containers.get(path[:depth], "dict"))
                branch.children[path[depth - 1]] = below
            branch = below
        if path[-1] in branch.children:
            raise StateMismatchError(
                "there are two values at one place", kind="type_mismatch", tensor=name
            )
        branch.children[path[-1]] = leaf
    return root


def _names(manifest: Manifest) -> Iterator[str]:
    yield from manifest.tensors
    yield from manifest.objects
    yield from manifest.per_rank_tensors
    yield from manifest.per_rank_objects


def _leaf(manifest: Manifest, name: str, rank: int, world_size: int) -> StoredLeaf | None:
    if name in manifest.tensors:
        return StoredLeaf(name=name, tensor=manifest.tensors[name])
    if name in manifest.objects:
        return StoredLeaf(name=name, tensor=None)
    same = world_size == manifest.world_size
    tensors = manifest.per_rank_tensors.get(name)
    if tensors:
        owner = rank if same else min(tensors)
        if owner not in tensors:
            return None
        return StoredLeaf(name=name, tensor=tensors[owner], is_example=not same)
    objects = manifest.per_rank_objects.get(name)
    if objects and (not same or rank in objects):
        return StoredLeaf(name=name, tensor=None)
    return None
