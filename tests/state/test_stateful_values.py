"""``Stateful`` values are asked for their state; the caller's containers stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.state.flatten import flatten, get_at, resolve_stateful
from dcp_engine.state.per_rank import PerRank
from dcp_engine.state.stateful_values import is_stateful


class Counter:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class CountingDict(dict[str, Any], Counter):
    def __init__(self) -> None:
        Counter.__init__(self, 7)


def test_found_at_any_depth_and_nothing_is_changed() -> None:
    a, b, c, d = (Counter(i) for i in range(4))
    untouched = {"k": [torch.ones(1)]}
    inner_list = [1, b]
    state = {
        "a": a,
        "l": inner_list,
        "t": (0, {"c": c}),
        "r": PerRank(d),
        "u": untouched,
        "model": torch.nn.Linear(2, 2),
    }
    plain, found = resolve_stateful(state)
    assert [path for path, _ in found] == [("a",), ("l", 1), ("t", 1, "c"), ("r",), ("model",)]
    assert [value for _, value in found][:4] == [a, b, c, d]
    assert plain["a"] == {"value": 0}
    assert plain["l"] == [1, {"value": 1}]
    assert plain["t"] == (0, {"c": {"value": 2}})
    assert plain["r"] == PerRank({"value": 3})
    assert plain["u"] is untouched
    assert set(plain["model"]) == {"weight", "bias"}
    assert state["l"] is inner_list
    assert inner_list == [1, b]
    assert state["t"] == (0, {"c": c})
    for path, value in found[:4]:
        assert get_at(plain, path) == value.state_dict()
    assert "r.value" in flatten(plain).mappings


def test_a_mapping_that_is_stateful_counts_as_stateful() -> None:
    state = {"x": CountingDict()}
    assert resolve_stateful(state)[0] == {"x": {"value": 7}}


def test_what_a_state_dict_returns_is_not_searched() -> None:
    class Outer(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"inner": Counter(1)}

    plain, found = resolve_stateful({"o": Outer(0)})
    assert len(found) == 1
    assert isinstance(plain["o"]["inner"], Counter)
    (leaf,) = flatten(plain).leaves
    assert leaf.fqn == "o.inner"


@pytest.mark.parametrize("value", [Counter, torch.ones(1), 1, "a", None, PerRank(Counter(1))])
def test_not_stateful(value: Any) -> None:
    assert not is_stateful(value)


def test_modules_and_optimizers_are_stateful() -> None:
    module = torch.nn.Linear(1, 1)
    assert is_stateful(module)
    assert is_stateful(torch.optim.SGD(module.parameters(), lr=1.0))


def test_cycles_end() -> None:
    cyclic: dict[str, Any] = {}
    cyclic["a"] = cyclic
    with pytest.raises(UnsupportedStateError, match="cycle"):
        resolve_stateful(cyclic)


def test_keys_are_checked_on_the_way_to_a_stateful() -> None:
    with pytest.raises(UnsupportedStateError, match="None"):
        resolve_stateful({"a": {None: Counter(1)}})
