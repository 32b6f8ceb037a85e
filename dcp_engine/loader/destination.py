"""The state dict that a load fills: what it wants, and how loaded values get back into it.

Values that are ``Stateful`` are asked for their state dict once; its tensors are filled in place,
its other leaves replaced, and ``finish`` hands it to ``load_state_dict``. Everything else is put
into the caller's own containers.
"""

from __future__ import annotations

from typing import Any

from dcp_engine.state.flatten import Path, flatten, get_at, resolve_stateful, set_leaf

__all__ = ["Destination", "Path"]


class Destination:
    """One load's destination on one rank."""

    def __init__(self, state_dict: dict[str, Any]) -> None:
        self._root = state_dict
        self.resolved, self._stateful = resolve_stateful(state_dict)

    def put(self, path: Path, value: object) -> None:
        """Replace the leaf at ``path``."""
        set_leaf(self.resolved, path, value)
        if not self._below_stateful(path):
            set_leaf(self._root, path, value)

    def adopt_resolved(self) -> None:
        """Take over what a planner of another origin changed in ``resolved`` by itself."""
        for leaf in flatten(self.resolved).leaves:
            if not self._below_stateful(leaf.path):
                set_leaf(self._root, leaf.path, leaf.value)

    def finish(self) -> None:
        """Hand every ``Stateful`` value its state."""
        for path, value in self._stateful:
            value.load_state_dict(get_at(self.resolved, path))

    def _below_stateful(self, path: Path) -> bool:
        return any(path[: len(prefix)] == prefix for prefix, _ in self._stateful)
