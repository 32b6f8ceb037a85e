"""The state dict that a load fills: what it wants, and how loaded values get back into it.

Values that are ``Stateful`` are asked for their state dict once; its tensors are filled in place,
its other leaves replaced, and ``finish`` hands it to ``load_state_dict``. Everything else is put
into the caller's own containers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from dcp_engine.errors import UsageError
from dcp_engine.state.flatten import Path, get_at, resolve_stateful, set_leaf
from dcp_engine.state.per_rank import PerRank

__all__ = ["Destination", "Path"]


class Destination:
    """One load's destination on one rank."""

    def __init__(self, state_dict: dict[str, Any]) -> None:
        self._root = state_dict
        self._resolved: tuple[dict[str, Any], list[tuple[Path, Any]]] | None = None

    def resolve(self) -> None:
        """Ask ``Stateful`` values for their state; only the first call does."""
        if self._resolved is None:
            self._resolved = resolve_stateful(self._root)

    @property
    def resolved(self) -> dict[str, Any]:
        """The state dict with the state of ``Stateful`` values in their place."""
        return self._parts[0]

    @property
    def has_stateful(self) -> bool:
        """Whether ``finish`` calls foreign code."""
        return bool(self._parts[1])

    @property
    def _parts(self) -> tuple[dict[str, Any], list[tuple[Path, Any]]]:
        if self._resolved is None:
            raise UsageError("the destination has not been resolved")
        return self._resolved

    def put(self, path: Path, value: object) -> None:
        """Replace the leaf at ``path``."""
        set_leaf(self.resolved, path, value)
        if not any(path[: len(prefix)] == prefix for prefix, _ in self._parts[1]):
            set_leaf(self._root, path, value)

    def adopt_resolved(self) -> None:
        """Take over what a planner of another origin changed in ``resolved`` by itself, as torch's
        ``load`` does: every top-level value, and those that are new."""
        for path, value in self._without_stateful((), self.resolved):
            parent = get_at(self._root, path[:-1])
            if isinstance(parent, MutableMapping):
                parent[path[-1]] = value
            else:
                set_leaf(self._root, path, value)

    def _without_stateful(self, path: Path, node: Any) -> Iterator[tuple[Path, Any]]:
        """The largest parts of ``resolved`` that are not, and do not hold, a ``Stateful``'s."""
        inside = [prefix for prefix, _ in self._parts[1] if prefix[: len(path)] == path]
        if path in inside:
            return
        if path and not inside:
            yield path, node
            return
        while isinstance(node, PerRank):
            node = node.value
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from self._without_stateful((*path, key), value)

    def finish(self) -> None:
        """Hand every ``Stateful`` value its state."""
        for path, value in self._parts[1]:
            value.load_state_dict(get_at(self.resolved, path))
