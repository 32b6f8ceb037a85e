"""Paths through nested containers: names, looking up, putting back.

A path is a tuple of mapping keys and list positions. ``PerRank`` wrappers on the way are looked
through, and kept when something below them is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, MutableSequence
from typing import Any

from dcp_engine.errors import UnsupportedStateError, UsageError
from dcp_engine.state.per_rank import PerRank

__all__ = ["MAX_DEPTH", "Path", "checked_fqn", "get_at", "path_key", "set_leaf"]

Path = tuple[str | int, ...]

MAX_DEPTH = 100
"""Containers inside containers. Deeper is a mistake, or an attack on the readers' stacks."""


def path_key(key: object, path: Path) -> str | int:
    """The path element of a mapping's ``key``; ``path`` leads to the mapping.

    Subclasses of ``str`` and ``int`` (enum members) become the plain value, which finds the same
    entry again.

    Raises:
        UnsupportedStateError: any other type. ``bool`` too: True would come back as 1.
    """
    if type(key) is str or type(key) is int:
        return key
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return int(key)
    raise UnsupportedStateError(
        f"the key {key!r} of the mapping at {list(path)} is a {type(key).__name__}",
        tensor=".".join(map(str, path)) or None,
        hint="use str or int keys",
    )


def checked_fqn(path: Path) -> str:
    """Join ``path`` to a fully qualified name; one that is not valid UTF-8 is refused."""
    fqn = ".".join(map(str, path))
    try:
        fqn.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedStateError(
            f"the key {fqn!r} cannot be written as UTF-8", hint="rename the key"
        ) from error
    return fqn


def get_at(root: Any, path: Path) -> Any:
    """The value at ``path``; ``PerRank`` wrappers are taken off, the value's own too.

    Raises:
        UsageError: there is nothing at ``path``.
    """
    value = _unwrapped(root)
    for i, key in enumerate(path):
        try:
            value = _unwrapped(value[key])
        except (KeyError, IndexError, TypeError) as error:
            raise _nothing_there(path, i) from error
    return value


def set_leaf(
    root: Any, path: Path, value: Any, *, create: Mapping[Path, str] | None = None
) -> None:
    """Replace the value at ``path`` in ``root``.

    Dicts and lists are changed in place; tuples (named ones too) and ``PerRank`` wrappers are
    rebuilt, up to the nearest container that can be changed.

    Args:
        root: a mutable mapping (or list).
        path: not empty.
        create: container types by path (``FlatState.containers``): what is missing on the way is
            made, and lists and tuples are filled up with None. Without it nothing is made.
    Raises:
        UsageError: there is no such place, or nothing on the way can be changed.
    """
    if not path:
        raise UsageError("the state dict itself cannot be replaced")
    if _put(root, path, 0, value, create) is not root:
        raise UsageError(
            f"nothing on the way to {list(path)} can be changed in place",
            hint="use a dict at the top",
        )


def _put(node: Any, path: Path, depth: int, value: Any, create: Mapping[Path, str] | None) -> Any:
    """Put ``value`` below ``node``; return the node, which is another one if it was rebuilt."""
    if isinstance(node, PerRank):
        inner = _put(node.value, path, depth, value, create)
        return node if inner is node.value and depth < len(path) else PerRank(inner)
    if depth == len(path):
        return value
    key = path[depth]
    old = _child(node, path, depth, create)
    new = _put(old, path, depth + 1, value, create)
    if new is old and depth + 1 < len(path) and _holds(node, key):
        return node
    if isinstance(node, MutableMapping):
        node[key] = new
        return node
    if isinstance(node, Mapping) or not isinstance(key, int):
        raise UsageError(
            f"the {type(node).__name__} at {list(path[:depth])} cannot be changed",
            tensor=".".join(map(str, path)),
            hint="use a dict",
        )
    if isinstance(node, MutableSequence):
        node.extend([None] * (key + 1 - len(node)))
        node[key] = new
        return node
    items = [*node, *([None] * (key + 1 - len(node)))]
    items[key] = new
    make = getattr(type(node), "_make", type(node))
    return make(items)


def _child(node: Any, path: Path, depth: int, create: Mapping[Path, str] | None) -> Any:
    key = path[depth]
    sequence = isinstance(node, (MutableSequence, tuple))
    if not (isinstance(node, Mapping) or (sequence and isinstance(key, int) and key >= 0)):
        raise _nothing_there(path, depth)
    if _holds(node, key):
        child = node[key]
        if child is not None or create is None or depth + 1 == len(path):
            return child
    elif create is None:
        raise _nothing_there(path, depth)
    if depth + 1 == len(path):
        return None
    kind = (create or {}).get(path[: depth + 1], "dict")
    return {} if kind == "dict" else [] if kind == "list" else ()


def _holds(node: Any, key: str | int) -> bool:
    if isinstance(node, Mapping):
        return key in node
    return isinstance(key, int) and key < len(node)


def _unwrapped(value: Any) -> Any:
    while isinstance(value, PerRank):
        value = value.value
    return value


def _nothing_there(path: Path, depth: int) -> UsageError:
    return UsageError(
        f"there is no place {list(path)} in the state dict: nothing at {list(path[: depth + 1])}",
        tensor=".".join(map(str, path)),
    )
