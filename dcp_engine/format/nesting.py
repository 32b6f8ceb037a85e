"""How a state dict was nested: which keys lead to each fully qualified name.

Belongs here: the encoding of paths and containers as one table of containers and one of leaves,
its merging over ranks, and putting flat values back into nested dicts, lists and tuples. Does
not belong here: taking a state dict apart (``state.flatten``).

The encoding is JSON, so that a manifest can hold it as it is:
``{"containers":{"parents":..,"keys":[..],"kinds":".."},"leaves":{"parents":..,"keys":[..],
"names":[[row,name],..]}}``; see ``docs/format.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from dcp_engine.errors import InvalidPlanError, StateMismatchError, UnsupportedStateError
from dcp_engine.format.json_columns import (
    Column,
    decode_as,
    encode_column,
    expand_column,
    object_fields,
    refuse,
)

__all__ = ["MAX_DEPTH", "Nesting", "Path", "encode_nesting", "merge_nestings"]

Key = str | int
Path = tuple[str | int, ...]

_KINDS = {"dict": "d", "list": "l", "tuple": "t"}
_KIND_NAMES = {letter: name for name, letter in _KINDS.items()}
_MAX_ROWS = 1 << 31
MAX_DEPTH = 128
"""Containers in containers. ``state.flatten`` stops at 100."""
_FREE_LENGTH = 1 << 20
_LENGTH_PER_BYTE = 64
"""How long all names and paths together may be, against the bytes that encode them: a few
bytes can put a long key above many others."""
_LEAVE_OUT = (
    "leave the key out on ranks that hold nothing below it; torch's get_state_dict with "
    "full_state_dict=True and cpu_offload=True returns an empty dict on all ranks but 0"
)
_encoder = msgspec.json.Encoder()


class Nesting:
    """Paths by fully qualified name, and what each container is. Read-only."""

    def __init__(self, data: bytes) -> None:
        """``data`` is what ``encode_nesting`` returned; it is decoded at the first look, which
        raises ``DamagedCheckpointError`` if it is something else."""
        self.data = data

    @cached_property
    def _decoded(self) -> tuple[dict[str, Path], dict[Path, str]]:
        fields = object_fields(self.data, "nesting")
        if not {"containers", "leaves"} <= fields.keys():
            refuse("nesting: a field is missing")
        budget = _Budget(_FREE_LENGTH + _LENGTH_PER_BYTE * len(self.data))
        containers = _read_containers(fields["containers"], budget)
        paths = _read_leaves(fields["leaves"], containers, budget)
        if any(path in containers for path in paths.values()):
            refuse("nesting: a leaf is a container too")
        return paths, containers

    def path(self, fqn: str) -> Path:
        """The keys that lead to ``fqn``; a name that was never nested is its own key."""
        return self._decoded[0].get(fqn, (fqn,))

    def paths(self) -> Mapping[str, Path]:
        """All paths, in the order of the state dict."""
        return self._decoded[0]

    def containers(self) -> Mapping[Path, str]:
        """By path, ``"dict"``, ``"list"`` or ``"tuple"``; the state dict itself is ``()``."""
        return self._decoded[1]

    def unflatten(self, values: Mapping[str, object]) -> Any:
        """Nest ``values``, some or all of those that were saved.

        Dicts leave out what is not in ``values``. Raises ``StateMismatchError`` (``missing_key``)
        for a list or tuple of which only a part is there.
        """
        nodes: dict[Path, dict[Key, object]] = {(): {}}
        for fqn, value in values.items():
            path = self.path(fqn)
            self._node(path[:-1], nodes)[path[-1]] = value
        # The deepest first, so that a list is made of values that are finished.
        for path in sorted(nodes, key=len, reverse=True):
            if path:
                nodes[path[:-1]][path[-1]] = self._finish(path, nodes[path])
        return self._finish((), nodes[()])

    def _node(self, path: Path, nodes: dict[Path, dict[Key, object]]) -> dict[Key, object]:
        found = nodes.get(path)
        if found is None:
            found = nodes[path] = {}
            # Claims the place among its siblings, so that dicts keep their order.
            self._node(path[:-1], nodes)[path[-1]] = found
        return found

    def _finish(self, path: Path, items: dict[Key, object]) -> object:
        kind = self._decoded[1].get(path, "dict")
        if kind == "dict":
            return items
        missing = [index for index in range(len(items)) if index not in items]
        if missing:
            raise StateMismatchError(
                f"position {missing[0]} of the {kind} is not among the values",
                kind="missing_key",
                tensor=".".join(map(str, path)),
                hint="take all values below it, or none",
            )
        ordered = [items[index] for index in range(len(items))]
        return ordered if kind == "list" else tuple(ordered)


def encode_nesting(paths: Mapping[str, Path], containers: Mapping[Path, str]) -> bytes:
    """Encode the nesting of a state dict.

    ``paths`` maps each fully qualified name to its keys, in order; ``containers`` maps the path
    of each container to ``"dict"``, ``"list"`` or ``"tuple"`` (a missing one is a dict). Same
    input, same bytes. Raises ``UnsupportedStateError`` for keys that are not valid UTF-8, and for
    containers nested more than ``MAX_DEPTH`` deep.
    """
    rows: dict[Path, int] = {(): 0}
    parents: list[int] = []
    keys: list[Key] = []
    kinds = [_KINDS[containers.get((), "dict")]]

    def row_of(path: Path) -> int:
        row = rows.get(path)
        if row is None:
            parent = row_of(path[:-1])
            row = rows[path] = len(rows)
            parents.append(parent)
            keys.append(path[-1])
            kinds.append(_KINDS[containers.get(path, "dict")])
        return row

    leaf_parents: list[int] = []
    leaf_keys: list[Key] = []
    renamed: list[tuple[int, str]] = []
    # Leaves of one container follow each other: what they share is found once.
    above: Path | None = None
    row, prefix = 0, ""
    for fqn, path in paths.items():
        if path[:-1] != above:
            if len(path) > MAX_DEPTH:
                raise UnsupportedStateError(f"it is nested more than {MAX_DEPTH} deep", tensor=fqn)
            above = path[:-1]
            row = row_of(above)
            prefix = "".join([f"{key}." for key in above])
        key = path[-1]
        if f"{prefix}{key}" != fqn:
            renamed.append((len(leaf_keys), fqn))
        leaf_parents.append(row)
        leaf_keys.append(key)
    try:
        return _encode(parents, keys, kinds, leaf_parents, leaf_keys, renamed)
    except UnicodeEncodeError as error:
        raise UnsupportedStateError(f"a key of the state dict cannot be stored: {error}") from error


def _encode(
    parents: list[int],
    keys: list[Key],
    kinds: list[str],
    leaf_parents: list[int],
    leaf_keys: list[Key],
    renamed: list[tuple[int, str]],
) -> bytes:
    return (
        b'{"containers":' + _table(parents, keys, "kinds", "".join(kinds))
        + b',"leaves":' + _table(leaf_parents, leaf_keys, "names", renamed)
        + b"}"
    )  # fmt: skip


def _table(parents: list[int], keys: list[Key], name: str, last: object) -> bytes:
    return (
        b'{"parents":' + encode_column(np.array(parents, np.int64))
        + b',"keys":' + _encoder.encode(keys)
        + b',"' + name.encode() + b'":' + _encoder.encode(last)
        + b"}"
    )  # fmt: skip


class _Budget:
    """What is left of the length that names and paths may have together."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self, length: int) -> None:
        """Take ``length`` away, or refuse."""
        self.left -= length
        if self.left < 0:
            refuse("nesting: the names are absurdly long")


def _read_table(data: msgspec.Raw, last: str, kind: Any) -> tuple[list[int], list[Key], Any]:
    fields = object_fields(data, "nesting")
    if not {"parents", "keys", last} <= fields.keys():
        refuse("nesting: a field is missing")
    keys: list[Key] = decode_as(list[str | int], fields["keys"], "nesting.keys")
    column = decode_as(Column, fields["parents"], "nesting.parents")
    parents = expand_column(column, len(keys), _MAX_ROWS, "nesting.parents").tolist()
    return parents, keys, decode_as(kind, fields[last], f"nesting.{last}")


def _read_containers(data: msgspec.Raw, budget: _Budget) -> dict[Path, str]:
    parents, keys, letters = _read_table(data, "kinds", str)
    if len(letters) != len(keys) + 1:
        refuse(f"nesting: {len(letters)} kinds for {len(keys) + 1} containers")
    paths: list[Path] = [()]
    found: dict[Path, str] = {}
    for row, letter in enumerate(letters):
        kind = _KIND_NAMES.get(letter)
        if kind is None:
            refuse("nesting: a container is neither dict, list nor tuple")
        if row:
            # A parent stands ahead of its children, so there are no cycles.
            parent = parents[row - 1]
            if parent >= row:
                refuse("nesting: a container stands ahead of its parent")
            above = paths[parent]
            if len(above) >= MAX_DEPTH:
                refuse(f"nesting: containers are nested more than {MAX_DEPTH} deep")
            _check_key(found[above], keys[row - 1])
            budget.spend(len(above) + 1)
            paths.append((*above, keys[row - 1]))
        found[paths[row]] = kind
    if len(found) != len(paths):
        refuse("nesting: a container is there twice")
    return found


def _check_key(kind: str, key: Key) -> None:
    if kind != "dict" and (isinstance(key, str) or key < 0):
        refuse(f"nesting: {str(key)[:40]!r} is no position in a {kind}")


def _read_leaves(
    data: msgspec.Raw, containers: Mapping[Path, str], budget: _Budget
) -> dict[str, Path]:
    parents, keys, renamed = _read_table(data, "names", list[tuple[int, str]])
    places, kinds = list(containers), list(containers.values())
    names = dict(renamed)
    prefixes = []
    for path in places:
        budget.spend(sum(len(str(key)) + 1 for key in path))
        prefixes.append("".join(f"{key}." for key in path))
    paths: dict[str, Path] = {}
    for row, (parent, key) in enumerate(zip(parents, keys, strict=True)):
        if parent >= len(places):
            refuse("nesting: a leaf names a container that is not there")
        _check_key(kinds[parent], key)
        budget.spend(len(prefixes[parent]) + len(places[parent]))
        fqn = names.get(row)
        paths[f"{prefixes[parent]}{key}" if fqn is None else fqn] = (*places[parent], key)
    if len(paths) != len(keys):
        refuse("nesting: a name is there twice")
    return paths


def merge_nestings(encoded: Sequence[bytes]) -> bytes:
    """Unite the nestings of all ranks, in rank order; the result depends on nothing else.

    Raises ``InvalidPlanError`` (``plan_divergence``), naming two ranks, if they put one name at
    two places or disagree about what a container is. Equal encodings are looked at once.
    """
    first_rank: dict[bytes, int] = {}
    for rank, data in enumerate(encoded):
        first_rank.setdefault(bytes(data), rank)
    if len(first_rank) == 1:
        return next(iter(first_rank))
    paths: dict[str, tuple[Path, int]] = {}
    containers: dict[Path, tuple[str, int]] = {}
    for data, rank in first_rank.items():
        nesting = Nesting(data)
        for fqn, path in nesting.paths().items():
            known, earlier = paths.setdefault(fqn, (path, rank))
            if known != path:
                _diverge(fqn, earlier, known, rank, path)
        for path, kind in nesting.containers().items():
            known_kind, earlier = containers.setdefault(path, (kind, rank))
            if known_kind != kind:
                _diverge(".".join(map(str, path)), earlier, known_kind, rank, kind)
    for fqn, (path, rank) in paths.items():
        if path in containers:
            kind, other = containers[path]
            one_value = "one value (as an empty container is)"
            _diverge(fqn, rank, one_value, other, f"a {kind} with values", hint=_LEAVE_OUT)
    if not first_rank:
        return encode_nesting({}, {})
    return encode_nesting(
        {fqn: path for fqn, (path, _) in paths.items()},
        {path: kind for path, (kind, _) in containers.items()},
    )


def _diverge(
    fqn: str, one: int, here: object, other: int, there: object, *, hint: str | None = None
) -> None:
    raise InvalidPlanError(
        f"the ranks nest {fqn!r} differently: {here} on rank {one}, {there} on rank {other}",
        kind="plan_divergence",
        tensor=fqn,
        rank=other,
        hint=hint,
    )
