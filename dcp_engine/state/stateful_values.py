"""``Stateful`` values replaced by their state dicts, without touching the caller's containers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.state.paths import MAX_DEPTH, Path, path_key
from dcp_engine.state.per_rank import PerRank
from dcp_engine.stateful import Stateful

__all__ = ["is_stateful", "resolve_stateful"]

# Checked first: the protocol's isinstance is slow, and a state dict may hold a million of these.
_NEVER = (int, float, str, bytes, complex, torch.Tensor, torch.dtype, type, type(None))


def is_stateful(value: object) -> bool:
    """Has ``value`` the methods of ``Stateful``? Classes, tensors and ``PerRank`` have not."""
    return not isinstance(value, (*_NEVER, PerRank)) and isinstance(value, Stateful)


def resolve_stateful(
    state_dict: Mapping[Any, Any],
) -> tuple[dict[Any, Any], list[tuple[Path, Any]]]:
    """Ask every ``Stateful`` value for its state dict.

    Values are looked for in dicts, lists, tuples and under ``PerRank``, at any depth, but not
    inside the state dicts they return: a ``Stateful`` there is an object like any other, as in
    torch's DCP. Modules and optimizers are ``Stateful``.

    Returns:
        ``(plain, stateful)``: a new top-level dict in which every container on the way to a
        ``Stateful`` is a copy (a plain dict for other mappings) and all others are the caller's
        own; and the values with their paths, in order. The state of one is
        ``get_at(plain, path)``.
    Raises:
        UnsupportedStateError: nesting deeper than ``MAX_DEPTH``, or a cycle.
    """
    found: list[tuple[Path, Any]] = []
    plain = {key: _resolve(value, (key,), found) for key, value in state_dict.items()}
    return plain, [(_checked(path), value) for path, value in found]


def _checked(path: tuple[Any, ...]) -> Path:
    return tuple(path_key(key, path[:i]) for i, key in enumerate(path))


def _resolve(value: Any, path: tuple[Any, ...], found: list[tuple[Path, Any]]) -> Any:
    """The value with its ``Stateful``s replaced; the same object if there are none."""
    if isinstance(value, _NEVER):
        return value
    if is_stateful(value):
        found.append((path, value))
        return value.state_dict()
    if not isinstance(value, (Mapping, list, tuple, PerRank)):
        return value
    if len(path) > MAX_DEPTH:
        raise UnsupportedStateError(
            f"nesting at {list(path[:3])}... is deeper than {MAX_DEPTH} levels, or has a cycle",
            tensor=".".join(map(str, path[:3])),
            hint="flatten the structure, or store it as one object",
        )
    if isinstance(value, PerRank):
        inner = _resolve(value.value, path, found)
        return value if inner is value.value else PerRank(inner)
    if isinstance(value, Mapping):
        new = {key: _resolve(item, (*path, key), found) for key, item in value.items()}
        return new if any(new[key] is not item for key, item in value.items()) else value
    items = [_resolve(item, (*path, i), found) for i, item in enumerate(value)]
    if all(a is b for a, b in zip(items, value, strict=True)):
        return value
    return items if isinstance(value, list) else getattr(type(value), "_make", type(value))(items)
