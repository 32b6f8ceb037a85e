"""A nested state dict as a flat list of leaves, and back.

Belongs here: which containers are entered, what a leaf is called, and putting a value back where
it was. Does not belong here: what a leaf is (``state.adapters``), asking ``Stateful`` values for
their state (``state.stateful_values``, re-exported here).

Mappings are entered always. Lists and tuples are entered only if they hold, at any depth, a
mapping, a tensor, a ``Stateful`` or a ``PerRank``; else they are one leaf, as empty containers
are. ``PerRank`` adds nothing to a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.state.paths import MAX_DEPTH, Path, checked_fqn, get_at, path_key, set_leaf
from dcp_engine.state.per_rank import PerRank
from dcp_engine.state.stateful_values import is_stateful, resolve_stateful

__all__ = [
    "ContainerType",
    "FlatState",
    "Leaf",
    "Path",
    "flatten",
    "get_at",
    "resolve_stateful",
    "set_leaf",
    "unflatten",
]

ContainerType = Literal["dict", "list", "tuple"]

_PLAIN = frozenset({int, float, str, bool, bytes, complex, type(None)})


class Leaf(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One value of the state dict."""

    fqn: str
    """The path's elements, joined by dots."""
    path: Path
    value: Any
    per_rank: bool


@dataclass(frozen=True, kw_only=True)
class FlatState:
    """A state dict, flattened; leaves in the order of the state dict."""

    leaves: tuple[Leaf, ...]
    mappings: dict[str, Path]
    """Fully qualified name to path."""
    containers: dict[Path, ContainerType]
    """Every container that was entered, parents first; the state dict itself is ``()``. Mappings
    of any class are "dict", tuples of any class "tuple"."""


def flatten(state_dict: Mapping[Any, Any], *, flatten_state_dict: bool = True) -> FlatState:
    """List the leaves of ``state_dict``.

    Args:
        state_dict: keys are ``str`` or ``int`` at every level.
        flatten_state_dict: False makes every top-level value one leaf, whatever it is.
    Raises:
        UnsupportedStateError: a key of another type or one that is not valid UTF-8, a container
            that holds itself, nesting deeper than ``MAX_DEPTH`` (``kind="unsupported_state"``);
            two values with one name (``kind="duplicate_key"``, both paths named).
    """
    leaves: list[Leaf] = []
    mappings: dict[str, Path] = {}
    containers: dict[Path, ContainerType] = {(): "dict"}
    enter = flatten_state_dict
    for path, value, per_rank in _walk(state_dict, containers, enter_values=enter):
        fqn = checked_fqn(path)
        if fqn in mappings:
            raise UnsupportedStateError(
                f"the values at {list(mappings[fqn])} and {list(path)} would both be stored "
                f"as {fqn!r}",
                kind="duplicate_key",
                tensor=fqn,
                hint="rename one of the keys",
            )
        mappings[fqn] = path
        leaves.append(Leaf(fqn=fqn, path=path, value=value, per_rank=per_rank))
    return FlatState(leaves=tuple(leaves), mappings=mappings, containers=containers)


def unflatten(
    values: Mapping[str, Any], mappings: Mapping[str, Path], containers: Mapping[Path, str]
) -> dict[Any, Any]:
    """Build the nested state dict that ``flatten`` took apart, of plain dicts, lists and tuples.

    Args:
        values: by fully qualified name; those that ``mappings`` does not know become top-level
            keys. Names that ``mappings`` holds and ``values`` lacks are left out (in a list or
            tuple, None).
    """
    root: dict[Any, Any] = {}
    for fqn, value in values.items():
        set_leaf(root, mappings.get(fqn, (fqn,)), value, create=containers)
    return root


def _walk(
    root: Mapping[Any, Any], containers: dict[Path, ContainerType], *, enter_values: bool
) -> Iterator[tuple[Path, Any, bool]]:
    def children(path: Path, value: Any, per_rank: bool) -> Iterator[tuple[Path, Any, bool]]:
        while isinstance(value, PerRank):
            per_rank, value = True, value.value
        container = _container_type(value, path) if enter_values else None
        if container is None:
            yield path, value, per_rank
            return
        if id(value) in above:
            raise UnsupportedStateError(
                f"the {type(value).__name__} at {list(path)} holds itself",
                tensor=".".join(map(str, path)),
                hint="remove the cycle",
            )
        above.add(id(value))
        containers[path] = container
        items = value.items() if container == "dict" else enumerate(value)
        for key, item in items:
            below = (*path, path_key(key, path) if container == "dict" else key)
            yield from children(below, item, per_rank)
        above.remove(id(value))

    above = {id(root)}
    for key, item in root.items():
        yield from children((path_key(key, ()),), item, False)


def _container_type(value: Any, path: Path) -> ContainerType | None:
    """The type of container to enter; None if ``value`` is a leaf."""
    if type(value) in _PLAIN or isinstance(value, torch.Tensor) or is_stateful(value):
        return None
    if isinstance(value, Mapping):
        kind: ContainerType = "dict"
        enter = len(value) > 0
    elif isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        enter = _holds_state(value, path, MAX_DEPTH - len(path))
    else:
        return None
    if enter and len(path) >= MAX_DEPTH:
        raise _too_deep(path)
    return kind if enter else None


def _holds_state(values: list[Any] | tuple[Any, ...], path: Path, depth: int) -> bool:
    if depth < 0:
        raise _too_deep(path)
    for value in values:
        if type(value) in _PLAIN:
            continue
        if isinstance(value, (Mapping, torch.Tensor, PerRank)) or is_stateful(value):
            return True
        if isinstance(value, (list, tuple)) and _holds_state(value, path, depth - 1):
            return True
    return False


def _too_deep(path: Path) -> UnsupportedStateError:
    return UnsupportedStateError(
        f"nesting at {list(path[:3])}... is deeper than {MAX_DEPTH} levels, or has a cycle",
        tensor=".".join(map(str, path[:3])),
        hint="flatten the structure, or store it as one object",
    )
