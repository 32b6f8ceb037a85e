"""What a read asks for: which stored values, into which memory, and what is made of them.

Belongs here: matching the caller's state dict with what is stored, and putting loaded values into
it. No I/O. Does not belong here: reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcp_engine.checkpointer.errors import LoadMismatchError
from dcp_engine.checkpointer.own_leaves import is_shared
from dcp_engine.checkpointer.stored_tree import StoredBranch, StoredLeaf, StoredNode
from dcp_engine.state.adapters import FLATTEN_KEY
from dcp_engine.state.adapters.wrapper import is_wrapper
from dcp_engine.state.paths import Path
from dcp_engine.state.per_rank import PerRank
from dcp_engine.state.stateful_values import is_stateful

__all__ = ["ABSENT", "Request", "fill", "request_all", "request_some"]

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "ABSENT"})()
"""In the place of a value that is not there."""


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    name: str
    target: Any
    """What the caller has there; ``ABSENT`` or None for nothing."""
    label: str


@dataclass(frozen=True, kw_only=True)
class _Branch:
    kind: str
    children: Sequence[tuple[str | int, _Node]]
    target: Any


@dataclass(frozen=True, kw_only=True)
class _Keep:
    """Not stored: what the caller has stays."""

    target: Any


@dataclass(frozen=True, kw_only=True)
class _Own:
    """Below a ``PerRank`` of the caller's, which stays."""

    child: _Node


_Node = _Leaf | _Branch | _Keep | _Own


@dataclass(kw_only=True)
class Request:
    """What to load, and where."""

    destination: dict[str, Any] = field(default_factory=dict)
    """By fully qualified name: a tensor to fill, a ``Stateful`` to hand its state, or None for an
    object."""
    fresh: set[str] = field(default_factory=set)
    """Names of tensors that the caller has no memory for."""
    missing: list[str] = field(default_factory=list)
    """Keys that are not stored, as the caller would write them."""
    root: _Node = field(default_factory=lambda: _Keep(target=None))


def request_all(tree: StoredBranch, device: torch.device) -> Request:
    """Everything that is stored for this rank."""
    walk = _Walk(tree, device)
    walk.request.root = walk.everything(tree, (), target=ABSENT)
    return walk.request


def request_some(
    tree: StoredBranch, state_dict: Mapping[Any, Any], device: torch.device
) -> Request:
    """What ``state_dict`` has places for.

    Raises ``LoadMismatchError`` for a place that what is stored does not fit.
    """
    walk = _Walk(tree, device)
    walk.request.root = walk.some(tree, state_dict, ())
    return walk.request


def fill(
    request: Request, values: Mapping[str, Any], *, same_types: bool = True
) -> tuple[Any, list[str]]:
    """What was asked for, in the caller's containers where there are any; and the keys below
    dicts that turned out to be stored empty.

    Args:
        values: what was loaded, by name; what is left out keeps what the caller has there.
        same_types: an object of another type than the one it would replace is refused.

    Raises ``LoadMismatchError``, and puts nothing in place then.
    """
    if same_types:
        _compare_types(request.root, values)
    emptied = [
        leaf
        for leaf in _leaves(request.root)
        if isinstance(leaf.target, Mapping) and leaf.target and values.get(leaf.name) == {}
    ]
    kept = {leaf.name for leaf in emptied}
    values = {name: value for name, value in values.items() if name not in kept}
    missing = [f"{leaf.label}{_step(key)}" for leaf in emptied for key in leaf.target]
    return _filled(request.root, values), missing


class _Walk:
    """Through what is stored, and what the caller has beside it."""

    def __init__(self, tree: StoredBranch, device: torch.device) -> None:
        self.request = Request()
        self._device = device
        self._unnested = {
            key: node
            for key, node in tree.children.items()
            if isinstance(key, str) and "." in key and isinstance(node, StoredLeaf)
        }
        """Leaves by their full names, where the checkpoint does not say how they were nested."""

    def everything(self, node: StoredNode, path: Path, target: Any) -> _Node:
        """All below ``node``."""
        if isinstance(node, StoredLeaf):
            return self._leaf(node, path, target)
        return _Branch(
            kind=node.kind,
            children=[
                (key, self.everything(child, (*path, key), ABSENT))
                for key, child in node.children.items()
                if key != FLATTEN_KEY
            ],
            target=target,
        )

    def some(self, node: StoredNode, target: Any, path: Path) -> _Node:
        """What ``target`` has places for."""
        if isinstance(target, PerRank):
            return _Own(child=self.some(node, target.value, path))
        if target is None:
            return self.everything(node, path, target)
        if isinstance(node, StoredLeaf):
            return self._fitting_leaf(node, target, path)
        if is_stateful(target) or (node.is_wrapper and is_wrapper(target)):
            name = ".".join(map(str, path))
            self.request.destination[name] = target
            return _Keep(target=target)
        if node.kind == "dict" and isinstance(target, Mapping):
            return self._some_of_dict(node, target, path)
        if node.kind != "dict" and isinstance(target, list | tuple):
            return self._some_of_list(node, target, path)
        raise _mismatch(path, target, f"a {node.kind}")

    def _some_of_dict(self, node: StoredBranch, target: Mapping[Any, Any], path: Path) -> _Branch:
        children: list[tuple[str | int, _Node]] = []
        for key, value in target.items():
            below = (*path, key)
            child = node.children.get(key) or self._without_nesting(below, value)
            if child is None or isinstance(key, bool):
                self.request.missing.append(_label(below))
                continue
            children.append((key, self.some(child, value, below)))
        return _Branch(kind="dict", children=children, target=target)

    def _some_of_list(
        self, node: StoredBranch, target: list[Any] | tuple[Any, ...], path: Path
    ) -> _Branch:
        children: list[tuple[str | int, _Node]] = []
        length = max([len(target), *(int(key) + 1 for key in node.children)])
        for at in range(length):
            value = target[at] if at < len(target) else None
            child = node.children.get(at) or self._without_nesting((*path, at), value)
            if child is not None:
                children.append((at, self.some(child, value, (*path, at))))
            elif value is not None:
                self.request.missing.append(_label((*path, at)))
                children.append((at, _Keep(target=value)))
        return _Branch(kind=node.kind, children=children, target=target)

    def _without_nesting(self, path: Path, target: Any) -> StoredNode | None:
        """What is stored for ``path`` under its full name, or names below it."""
        if not self._unnested:
            return None
        name = ".".join(map(str, path))
        if name in self._unnested:
            return self._unnested[name]
        if not isinstance(target, Mapping | list | tuple):
            return None
        if not any(other.startswith(f"{name}.") for other in self._unnested):
            return None
        return StoredBranch(kind="dict" if isinstance(target, Mapping) else "list")

    def _fitting_leaf(self, node: StoredLeaf, target: Any, path: Path) -> _Node:
        stored = node.tensor
        if is_wrapper(target) and not is_shared(target):
            raise _mismatch(path, target, "a plain tensor" if stored is not None else "an object")
        takes_tensor = isinstance(target, torch.Tensor) or is_shared(target)
        if (stored is not None) != takes_tensor:
            raise _mismatch(path, target, "a tensor" if stored is not None else "an object")
        if (
            stored is not None
            and not (node.is_example or is_shared(target))
            and (tuple(target.shape), target.dtype) != (stored.shape, stored.dtype)
        ):
            raise LoadMismatchError(
                f"the target is {target.dtype} of shape {list(target.shape)}, what is stored "
                f"{stored.dtype} of shape {list(stored.shape)}",
                kind="shape_mismatch" if target.dtype == stored.dtype else "dtype_mismatch",
                tensor=_label(path),
                hint="make the target what was saved, or None",
            )
        return self._leaf(node, path, target)

    def _leaf(self, node: StoredLeaf, path: Path, target: Any) -> _Leaf:
        request = self.request
        has_memory = isinstance(target, torch.Tensor) or (target is not None and is_shared(target))
        if node.tensor is None:
            request.destination[node.name] = None
        elif has_memory:
            request.destination[node.name] = target
        else:
            request.destination[node.name] = torch.empty(
                node.tensor.shape, dtype=node.tensor.dtype, device=self._device
            )
            request.fresh.add(node.name)
        return _Leaf(name=node.name, target=target, label=_label(path))


def _leaves(node: _Node) -> Iterator[_Leaf]:
    if isinstance(node, _Leaf):
        yield node
    elif isinstance(node, _Own):
        yield from _leaves(node.child)
    elif isinstance(node, _Branch):
        for _, child in node.children:
            yield from _leaves(child)


def _compare_types(root: _Node, values: Mapping[str, Any]) -> None:
    for leaf in _leaves(root):
        target = leaf.target
        if target is None or target is ABSENT or leaf.name not in values:
            continue
        value = values[leaf.name]
        if isinstance(target, torch.Tensor) or is_shared(target) or isinstance(target, type(value)):
            continue
        raise LoadMismatchError(
            f"the target is a {type(target).__name__}, what is stored a {type(value).__name__}",
            kind="type_mismatch",
            tensor=leaf.label,
            hint="make the target what was saved, or None",
        )


def _filled(node: _Node, values: Mapping[str, Any]) -> Any:
    if isinstance(node, _Keep):
        return node.target
    if isinstance(node, _Own):
        value = _filled(node.child, values)
        return value if value is ABSENT else PerRank(value)
    if isinstance(node, _Leaf):
        return values.get(node.name, node.target)
    made = {key: _filled(child, values) for key, child in node.children}
    nothing = node.target is None or node.target is ABSENT
    if nothing and made and all(value is ABSENT for value in made.values()):
        return node.target  # all of it was skipped
    if node.kind == "dict":
        if isinstance(node.target, MutableMapping):
            node.target.update({k: v for k, v in made.items() if v is not ABSENT})
            return node.target
        return {key: value for key, value in made.items() if value is not ABSENT}
    length = max((int(key) + 1 for key in made), default=0)
    items = [made.get(at) for at in range(length)]
    items = [None if item is ABSENT else item for item in items]
    return tuple(items) if node.kind == "tuple" else items


def _label(path: Path) -> str:
    """A key as it is written: ``model.layers[0].weight``."""
    return "".join(map(_step, path)).removeprefix(".")


def _step(key: Any) -> str:
    return f"[{key}]" if type(key) is int else f".{key}"


def _mismatch(path: Path, target: Any, stored: str) -> LoadMismatchError:
    return LoadMismatchError(
        f"the target is a {type(target).__name__}, what is stored {stored}",
        kind="type_mismatch",
        tensor=_label(path),
        hint="make the target what was saved, or None",
    )
