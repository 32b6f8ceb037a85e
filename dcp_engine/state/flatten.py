"""A nested state dict as a flat list of leaves, and back.

Belongs here: which containers are entered, what a leaf is called, and putting a value back where
it was. Does not belong here: what a leaf is (``state.adapters``), asking ``Stateful`` values for
their state (``state.stateful_values``, re-exported here).

Mappings are entered always. Lists and tuples are entered only if they hold, at any depth, a
mapping, a tensor, a ``Stateful`` or a ``PerRank``; else they are one leaf, as empty containers
are. ``PerRank`` adds nothing to a path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

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
    walk = _Walk(enter_values=flatten_state_dict)
    walk.children(
        state_dict.items(), (), "", per_rank=False, is_mapping=True, above={id(state_dict)}
    )
    leaves = walk.leaves
    # One look at all names, where there may be a hundred thousand.
    if not "".join([leaf.fqn for leaf in leaves]).isascii():
        for leaf in leaves:
            checked_fqn(leaf.path)
    mappings = {leaf.fqn: leaf.path for leaf in leaves}
    if len(mappings) < len(leaves):
        _refuse_one_name(leaves)
    return FlatState(leaves=tuple(leaves), mappings=mappings, containers=walk.containers)


def _refuse_one_name(leaves: list[Leaf]) -> NoReturn:
    first: dict[str, Leaf] = {}
    leaf = next(leaf for leaf in leaves if first.setdefault(leaf.fqn, leaf) is not leaf)
    raise UnsupportedStateError(
        f"the values at {list(first[leaf.fqn].path)} and {list(leaf.path)} would both be stored "
        f"as {leaf.fqn!r}",
        kind="duplicate_key",
        tensor=leaf.fqn,
        hint="rename one of the keys",
    )


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


class _Walk:
    """Collects leaves and containers."""

    def __init__(self, *, enter_values: bool) -> None:
        self.leaves: list[Leaf] = []
        self.containers: dict[Path, ContainerType] = {(): "dict"}
        self._enter_values = enter_values

    def children(
        self,
        items: Iterable[tuple[Any, Any]],
        path: Path,
        prefix: str,
        *,
        per_rank: bool,
        is_mapping: bool,
        above: set[int],
    ) -> None:
        """Take apart what lies in the container at ``path``, whose children's names begin with
        ``prefix``; ``above`` are the containers on the way to it, itself among them."""
        append = self.leaves.append
        for key, item in items:
            if is_mapping and type(key) is not str:
                key = path_key(key, path)
            if type(item) is torch.Tensor:  # most are: a loop without a call
                append(Leaf(fqn=f"{prefix}{key}", path=(*path, key), value=item, per_rank=per_rank))
                continue
            self._child((*path, key), f"{prefix}{key}", item, per_rank, above)

    def _child(self, path: Path, fqn: str, value: Any, per_rank: bool, above: set[int]) -> None:
        while isinstance(value, PerRank):
            per_rank, value = True, value.value
        container = _container_type(value, path) if self._enter_values else None
        if container is None:
            self.leaves.append(Leaf(fqn=fqn, path=path, value=value, per_rank=per_rank))
            return
        if id(value) in above:
            raise UnsupportedStateError(
                f"the {type(value).__name__} at {list(path)} holds itself",
                tensor=fqn,
                hint="remove the cycle",
            )
        self.containers[path] = container
        is_mapping = container == "dict"
        self.children(
            value.items() if is_mapping else enumerate(value),
            path,
            f"{fqn}.",
            per_rank=per_rank,
            is_mapping=is_mapping,
            above={*above, id(value)},
        )


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
