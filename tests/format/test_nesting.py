"""Nesting: round trips, merging over ranks, hostile tables."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import (
    CheckpointError,
    DamagedCheckpointError,
    InvalidPlanError,
    StateMismatchError,
    UnsupportedStateError,
)
from dcp_engine.format.nesting import MAX_DEPTH, Nesting, Path, encode_nesting, merge_nestings

SETTINGS = settings(max_examples=100, deadline=None)

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.integers(-9, 9)
leaves = st.integers(0, 99)
nested = st.dictionaries(
    keys,
    st.recursive(
        leaves,
        lambda inner: (
            st.dictionaries(keys, inner, min_size=1, max_size=4)
            | st.lists(inner, min_size=1, max_size=4)
            | st.lists(inner, min_size=1, max_size=4).map(tuple)
        ),
        max_leaves=12,
    ),
    max_size=5,
)


def flatten(
    value: Any, path: Path = ()
) -> tuple[dict[str, Path], dict[Path, str], dict[str, object]]:
    """By hand, so that the test does not lean on ``state.flatten``."""
    paths: dict[str, Path] = {}
    containers: dict[Path, str] = {}
    values: dict[str, object] = {}

    def walk(value: Any, path: Path) -> None:
        if isinstance(value, dict | list | tuple):
            containers[path] = type(value).__name__
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                walk(item, (*path, key))
        else:
            fqn = ".".join(map(str, path))
            paths[fqn], values[fqn] = path, value

    walk(value, path)
    return paths, containers, values


def count(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list | tuple) else 1


def order(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, order(item)) for key, item in value.items()]
    return [type(value), *map(order, value)] if isinstance(value, list | tuple) else value


@SETTINGS
@given(nested)
def test_state_dicts_come_back_as_they_were(state: dict[Any, Any]) -> None:
    paths, containers, values = flatten(state)
    if len(paths) != count(state):
        return  # two values with one name: refused before it comes here
    nesting = Nesting(encode_nesting(paths, containers))
    assert nesting.paths() == paths
    assert list(nesting.paths()) == list(paths)
    assert nesting.containers() == containers
    assert order(nesting.unflatten(values)) == order(state)


def test_a_name_that_is_not_its_path_is_kept() -> None:
    nesting = Nesting(encode_nesting({"x": ("a", "b"), "a.c": ("a", "c")}, {}))
    assert nesting.path("x") == ("a", "b")
    assert nesting.unflatten({"x": 1, "a.c": 2, "new.name": 3}) == {
        "a": {"b": 1, "c": 2}, "new.name": 3,
    }  # fmt: skip


def test_a_part_of_the_values() -> None:
    state = {"a": {"b": 1, "c": 2}, "l": [3, 4], "t": ({"x": 5},)}
    paths, containers, values = flatten(state)
    nesting = Nesting(encode_nesting(paths, containers))
    assert nesting.unflatten({"a.c": 2, "t.0.x": 5}) == {"a": {"c": 2}, "t": ({"x": 5},)}
    with pytest.raises(StateMismatchError, match="position 0") as caught:
        nesting.unflatten({"l.1": 4})
    assert (caught.value.kind, caught.value.tensor) == ("missing_key", "l")
    del values["l.1"]
    assert nesting.unflatten(values)["l"] == [3]


def test_unusual_keys() -> None:
    paths: dict[str, Path] = {str(1 << 70): (1 << 70,), "": ("",), "a..": ("a", "", "")}
    assert Nesting(encode_nesting(paths, {})).paths() == paths
    with pytest.raises(UnsupportedStateError):
        encode_nesting({"a": ("\ud800",)}, {})


def test_deep_nesting_is_refused_both_ways() -> None:
    path = ("k",) * (MAX_DEPTH + 1)
    with pytest.raises(UnsupportedStateError, match="deep"):
        encode_nesting({".".join(path): path}, {})
    fits = path[:MAX_DEPTH]
    assert Nesting(encode_nesting({".".join(fits): fits}, {})).path(".".join(fits)) == fits


def test_flat_state_dicts_are_small() -> None:
    paths: dict[str, Path] = {f"layers.{i}.weight": (f"layers.{i}.weight",) for i in range(100)}
    data = encode_nesting(paths, {(): "dict"})
    assert len(data) < sum(len(name) + 3 for name in paths) + 100


def encoded(state: dict[Any, Any]) -> bytes:
    paths, containers, _ = flatten(state)
    return encode_nesting(paths, containers)


def test_merging_unites_in_rank_order() -> None:
    first = encoded({"b": {"x": 1}, "l": [1]})
    second = encoded({"a": 2, "b": {"y": 1}, "l": [1, 2]})
    merged = Nesting(merge_nestings([first, first, second, first]))
    assert list(merged.paths()) == ["b.x", "l.0", "a", "b.y", "l.1"]
    assert merged.containers() == {(): "dict", ("b",): "dict", ("l",): "list"}
    assert merge_nestings([first, second]) == merge_nestings([first, second, second, first])


def test_merging_equal_nestings_decodes_nothing() -> None:
    # Bytes that cannot be decoded show that nothing looked into them.
    assert merge_nestings([b"x", bytearray(b"x"), b"x"]) == b"x"
    assert Nesting(merge_nestings([])).paths() == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": {"b": 1}}, {"a.b": 1}),
        ({"a": [1]}, {"a": (1,)}),
        ({"a": {0: 1}}, {"a": {"0": 1}}),
        ({"a": 1}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": 1}),
    ],
)
def test_ranks_that_nest_differently_are_named(one: dict[str, Any], other: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlanError, match=r"(?s)rank 0.*rank 2|rank 2.*rank 0") as caught:
        merge_nestings([encoded(one), encoded(one), encoded(other)])
    assert caught.value.kind == "plan_divergence"


@pytest.mark.parametrize(("full", "kind"), [({"w": 1}, "dict"), ([1], "list")])
@pytest.mark.parametrize("order", [1, -1])
def test_one_value_beside_a_container_is_explained(full: Any, kind: str, order: int) -> None:
    """As an empty container is: torch's ``get_state_dict`` makes them on all ranks but 0, with
    ``full_state_dict`` and ``cpu_offload``."""
    one_value, container = encoded({"model": None}), encoded({"model": full})
    with pytest.raises(InvalidPlanError) as caught:
        merge_nestings([one_value, container][::order])
    here, there = [(0, 1), (1, 0)][order == -1]
    assert caught.value.message == (
        f"the ranks nest 'model' differently: one value (as an empty container is) on rank {here}, "
        f"a {kind} with values on rank {there}"
    )
    assert "leave the key out" in str(caught.value.hint)
    left_out = Nesting(merge_nestings([encoded({}), container][::order]))
    assert left_out.paths() == Nesting(container).paths()


def table(
    containers: dict[str, object] | None = None, leaves: dict[str, object] | None = None
) -> bytes:
    value = {
        "containers": {"parents": 0, "keys": [], "kinds": "d", **(containers or {})},
        "leaves": {"parents": 0, "keys": [], "names": [], **(leaves or {})},
    }
    return json.dumps(value, separators=(",", ":")).encode()


BAD = {
    "no json": b"{",
    "empty": b"{}",
    "list": b"[]",
    "null": table({"keys": None}),
    "no kinds": table({"kinds": ""}),
    "unknown kind": table({"kinds": "x"}),
    "kinds missing": table({"keys": ["a"]}),
    "parent later": table({"keys": ["a"], "parents": 1, "kinds": "dd"}),
    "parent itself": table({"keys": ["a", "b"], "parents": [0, 2], "kinds": "ddd"}),
    "container twice": table({"keys": ["a", "a"], "kinds": "ddd"}),
    "key of a list": table({"keys": ["l", "x"], "parents": [0, 1], "kinds": "dld"}),
    "parents short": table({"keys": ["a", "b"], "parents": [0], "kinds": "ddd"}),
    "float key": table(leaves={"keys": [1.5]}),
    "leaf parent": table(leaves={"keys": ["a"], "parents": 1}),
    "leaf twice": table(leaves={"keys": ["a", "a"]}),
    "name twice": table(leaves={"keys": ["a", "b"], "names": [[1, "a"]]}),
    "leaf and container": table({"keys": ["a"], "kinds": "dd"}, {"keys": ["a"]}),
    "key twice": table().replace(b'"keys":[]', b'"keys":[],"keys":[]'),
    "deep": table(
        {"keys": ["k"] * 500, "parents": "0:1", "kinds": "d" * 501},
    ),
    # 10 kB of key above 100,000 leaves would be a gigabyte of names.
    "long names": table(
        {"keys": ["k" * 10_000], "kinds": "dd"}, {"keys": list(range(100_000)), "parents": 1}
    ),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_invalid_tables_are_refused(data: bytes) -> None:
    with pytest.raises(DamagedCheckpointError) as caught:
        Nesting(data).paths()
    assert caught.value.kind == "manifest_invalid"


@SETTINGS
@given(st.data())
def test_mutations_give_nestings_or_errors(data: st.DataObject) -> None:
    mutated = bytearray(encoded({"a": {"b": 1, 2: [3, (4,)]}, "c": 5}))
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    nesting = Nesting(bytes(mutated))
    with contextlib.suppress(CheckpointError):
        nesting.unflatten(dict.fromkeys(nesting.paths(), 0))
