"""Flattening nested state dicts, and putting values back."""

from __future__ import annotations

import enum
from collections import OrderedDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import UnsupportedStateError, UsageError
from dcp_engine.state.flatten import flatten, get_at, set_leaf, unflatten
from dcp_engine.state.per_rank import PerRank

Pair = namedtuple("Pair", "left right")


def fqns(state_dict: Any, **kwargs: Any) -> dict[str, Any]:
    return {leaf.fqn: leaf.value for leaf in flatten(state_dict, **kwargs).leaves}


def test_nested_dicts_of_any_class_in_order() -> None:
    state = {
        "m": OrderedDict(w=torch.ones(1), b=2),
        "opt": defaultdict(dict, {"state": {0: {"step": 1}, 1: {"step": 2}}}),
        "frozen": MappingProxyType({"x": "y"}),
    }
    flat = flatten(state)
    assert [leaf.fqn for leaf in flat.leaves] == [
        "m.w",
        "m.b",
        "opt.state.0.step",
        "opt.state.1.step",
        "frozen.x",
    ]
    assert flat.mappings["opt.state.1.step"] == ("opt", "state", 1, "step")
    assert list(flat.containers.items())[:2] == [((), "dict"), (("m",), "dict")]
    assert flat.containers[("opt", "state", 1)] == "dict"


def test_lists_and_tuples_are_entered_only_for_what_needs_it() -> None:
    t = torch.ones(1)
    state = {
        "numbers": [1, 2, [3, (4,)]],
        "betas": (0.9, 0.95),
        "deep": [1, [2, (3, [t])]],
        "dicts": [{"a": 1}, {}],
        "pair": Pair(t, 5),
        "marked": [PerRank(1), 2],
        "module": [torch.nn.Linear(1, 1)],
        "set": {1, 2},
    }
    flat = flatten(state)
    assert set(flat.mappings) == {
        "numbers",
        "betas",
        "deep.0",
        "deep.1.0",
        "deep.1.1.0",
        "deep.1.1.1.0",
        "dicts.0.a",
        "dicts.1",
        "pair.0",
        "pair.1",
        "marked.0",
        "marked.1",
        "module.0",
        "set",
    }
    assert flat.mappings["deep.1.1.1.0"] == ("deep", 1, 1, 1, 0)
    assert flat.containers[("deep", 1, 1)] == "tuple"
    assert flat.containers[("deep", 1)] == "list"
    assert flat.containers[("pair",)] == "tuple"


def test_empty_containers_are_leaves() -> None:
    assert fqns({"a": {}, "b": [], "c": (), "d": {"e": {}}}) == {
        "a": {},
        "b": [],
        "c": (),
        "d.e": {},
    }
    assert flatten({}).leaves == ()


def test_without_flattening_only_the_top_level_is_a_key() -> None:
    inner = {"a": torch.ones(1)}
    flat = flatten({"m": inner, "n": PerRank([inner])}, flatten_state_dict=False)
    assert [(leaf.fqn, leaf.value, leaf.per_rank) for leaf in flat.leaves] == [
        ("m", inner, False),
        ("n", [inner], True),
    ]
    assert flat.containers == {(): "dict"}


def test_per_rank_marks_everything_below_and_adds_nothing_to_the_path() -> None:
    flat = flatten({"r": PerRank({"a": 1, "b": [PerRank(torch.ones(1)), 2]}), "s": 3})
    assert [(leaf.fqn, leaf.per_rank) for leaf in flat.leaves] == [
        ("r.a", True),
        ("r.b.0", True),
        ("r.b.1", True),
        ("s", False),
    ]
    assert not any(isinstance(leaf.value, PerRank) for leaf in flat.leaves)


def test_two_values_with_one_name_are_refused_with_both_paths() -> None:
    with pytest.raises(UnsupportedStateError) as info:
        flatten({"a": {"b": 1}, "a.b": 2})
    assert info.value.kind == "duplicate_key"
    assert info.value.tensor == "a.b"
    assert "['a', 'b']" in str(info.value)
    assert "['a.b']" in str(info.value)
    with pytest.raises(UnsupportedStateError, match="duplicate_key"):
        flatten({"a": {1: 0, "1": 0}})


class Name(enum.StrEnum):
    LEFT = "left"


class Number(enum.IntEnum):
    ONE = 1


def test_keys_that_are_strings_or_ints_by_inheritance_are_taken_plainly() -> None:
    state = {Name.LEFT: {Number.ONE: 5}}
    (leaf,) = flatten(state).leaves
    assert (leaf.fqn, leaf.path) == ("left.1", ("left", 1))
    assert type(leaf.path[0]) is str
    assert type(leaf.path[1]) is int
    set_leaf(state, leaf.path, 6)
    assert state == {Name.LEFT: {Number.ONE: 6}}


@pytest.mark.parametrize("key", [True, None, 1.5, ("a",), b"a", torch.float32])
def test_other_keys_are_refused_by_name(key: Any) -> None:
    with pytest.raises(UnsupportedStateError) as info:
        flatten({"a": {key: 1}})
    assert info.value.kind == "unsupported_state"
    assert info.value.tensor == "a"
    assert repr(key) in str(info.value)
    with pytest.raises(UnsupportedStateError):
        flatten({key: 1})


def test_keys_must_be_utf8() -> None:
    assert list(fqns({"größe/λ": 1})) == ["größe/λ"]
    with pytest.raises(UnsupportedStateError, match="UTF-8"):
        flatten({"a\ud800": 1})


def test_cycles_and_absurd_depth_are_refused() -> None:
    cyclic: dict[str, Any] = {"a": {}}
    cyclic["a"]["b"] = cyclic
    with pytest.raises(UnsupportedStateError, match="holds itself"):
        flatten(cyclic)
    through_list: dict[str, Any] = {"a": [torch.ones(1)]}
    through_list["a"].append(through_list)
    with pytest.raises(UnsupportedStateError, match="holds itself"):
        flatten(through_list)
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UnsupportedStateError, match="deeper"):
        flatten({"a": endless})
    deep: dict[str, Any] = {"x": 1}
    for _ in range(150):
        deep = {"d": deep}
    with pytest.raises(UnsupportedStateError, match="deeper"):
        flatten(deep)
    deep = {"x": 1}
    for _ in range(90):
        deep = {"d": deep}
    assert len(flatten(deep).leaves) == 1


def test_one_container_in_two_places_is_no_cycle() -> None:
    shared = {"a": 1}
    assert set(fqns({"x": shared, "y": [shared, shared]})) == {"x.a", "y.0.a", "y.1.a"}


def test_values_go_back_in_place_and_tuples_are_rebuilt() -> None:
    inner: dict[str, Any] = {"list": [1, {"a": 0}], "pair": Pair({"x": 0}, [torch.ones(1)])}
    state: dict[str, Any] = {"m": inner, "t": (1, (2, {"k": 0})), "r": PerRank((0, {"z": 0}))}
    lists = inner["list"], inner["pair"].right
    for path, value in {
        ("m", "list", 1, "a"): "A",
        ("m", "list", 0): "L",
        ("m", "pair", 1, 0): "T",
        ("t", 1, 0): "two",
        ("t", 1, 1, "k"): "K",
        ("r", 0): "R",
        ("r", 1, "z"): "Z",
    }.items():
        set_leaf(state, path, value)
        assert get_at(state, path) == value
    assert state["m"] is inner
    assert inner["list"] is lists[0]
    assert inner["pair"].right is lists[1]
    assert inner["pair"] == Pair({"x": 0}, ["T"])
    set_leaf(state, ("m", "pair", 0), "left")
    assert inner["pair"] == Pair("left", ["T"])
    assert state["t"] == (1, ("two", {"k": "K"}))
    assert state["r"] == PerRank(("R", {"z": "Z"}))


def test_a_per_rank_leaf_keeps_its_mark() -> None:
    state = {"r": PerRank(1), "s": [PerRank(1)]}
    set_leaf(state, ("r",), 2)
    set_leaf(state, ("s", 0), 3)
    assert state == {"r": PerRank(2), "s": [PerRank(3)]}
    assert get_at(state, ("r",)) == 2


@pytest.mark.parametrize(
    "path", [("x",), ("a", "x"), ("a", "b", 0), ("l", 5), ("l", -1), ("l", "a"), ("t", 2)]
)
def test_nothing_is_made_that_was_not_there(path: Any) -> None:
    state = {"a": {"b": 1}, "l": [1], "t": (1, 2)}
    with pytest.raises(UsageError):
        set_leaf(state, path, 0)
    assert state == {"a": {"b": 1}, "l": [1], "t": (1, 2)}


def test_what_cannot_be_changed_is_said() -> None:
    state = {"f": MappingProxyType({"x": 1, "d": {"y": 1}})}
    with pytest.raises(UsageError, match="cannot be changed"):
        set_leaf(state, ("f", "x"), 2)
    set_leaf(state, ("f", "d", "y"), 2)
    assert state["f"]["d"] == {"y": 2}
    with pytest.raises(UsageError):
        set_leaf(state, (), 2)
    with pytest.raises(UsageError):
        get_at(state, ("f", "nothing"))


leaves = st.one_of(st.integers(), st.none(), st.text(max_size=3))
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.sampled_from("abc"), st.integers(0, 3)), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("xyz"), nested, max_size=3))
def test_unflatten_inverts_flatten(state: dict[str, Any]) -> None:
    flat = flatten(state)
    values = {leaf.fqn: leaf.value for leaf in flat.leaves}
    assert unflatten(values, flat.mappings, flat.containers) == state


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("xyz"), nested, max_size=3))
def test_every_leaf_can_be_replaced_where_it_is(state: dict[str, Any]) -> None:
    flat = flatten(state)
    for leaf in flat.leaves:
        set_leaf(state, leaf.path, ("new", leaf.fqn))
    assert [get_at(state, leaf.path) for leaf in flat.leaves] == [
        ("new", leaf.fqn) for leaf in flat.leaves
    ]


def test_a_missing_part_of_a_list_is_none() -> None:
    flat = flatten({"l": [torch.ones(1), 2, 3]})
    assert unflatten({"l.2": 3}, flat.mappings, flat.containers) == {"l": [None, None, 3]}
    assert unflatten({"other": 3}, {}, {}) == {"other": 3}
