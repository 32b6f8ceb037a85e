"""Wrapper subclasses: stored as their inner tensors and a description."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.state.adapters import FLATTEN_KEY, GroupRanks, describe, describe_leaves
from dcp_engine.state.flatten import flatten
from dcp_engine.state.values import EntryKind, ObjectValue, TensorValue
from tests.wrapper_tensors import Scaled

ALONE = GroupRanks()


def make() -> Scaled:
    return Scaled(torch.ones(4, 2, dtype=torch.int8), torch.ones(4), 8)


@pytest.mark.parametrize("kind", [EntryKind.REPLICATED, EntryKind.PER_RANK])
def test_inner_tensors_become_leaves(kind: EntryKind) -> None:
    wrapper = make()
    description, data, scale = describe("w", wrapper, kind=kind, group=ALONE, for_load=True)
    assert isinstance(description, ObjectValue)
    assert description.fqn == f"w.{FLATTEN_KEY}"
    assert {v.kind for v in (description, data, scale)} == {kind}
    assert isinstance(data, TensorValue)
    assert isinstance(scale, TensorValue)
    assert (data.fqn, data.dtype, scale.fqn) == ("w.data_", torch.int8, "w.scale")
    assert data.tensors[0].data_ptr() == wrapper.data_.data_ptr()


def description_of(value: Any) -> Any:
    return describe("w", value, kind=EntryKind.REPLICATED, group=ALONE)[0]


def test_descriptions_tell_apart_what_is_not_the_same_kind_of_thing() -> None:
    assert description_of(make()) == description_of(make())
    others = [
        Scaled(torch.ones(4, 2, dtype=torch.int8), torch.ones(4), 4),
        Scaled(torch.ones(4, 3, dtype=torch.int8), torch.ones(4), 8),
        Scaled(make(), torch.ones(4), 8),
    ]
    for other in others[:2]:
        assert description_of(other) != description_of(make())


def test_wrappers_inside_wrappers() -> None:
    values = describe("w", Scaled(make(), torch.ones(4), 2), kind=EntryKind.REPLICATED, group=ALONE)
    assert [value.fqn for value in values] == [
        f"w.{FLATTEN_KEY}",
        f"w.data_.{FLATTEN_KEY}",
        "w.data_.data_",
        "w.data_.scale",
        "w.scale",
    ]


def test_a_parameter_that_wraps() -> None:
    values = describe(
        "w", torch.nn.Parameter(make_parameter()), kind=EntryKind.REPLICATED, group=ALONE
    )
    assert [value.fqn for value in values] == [f"w.{FLATTEN_KEY}", "w.data_", "w.scale"]


def make_parameter() -> torch.Tensor:
    class Detachable(Scaled):
        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert func is torch.ops.aten.detach.default
            return cls(args[0].data_, args[0].scale, args[0].bits)

    return Detachable(torch.ones(4, 2, dtype=torch.int8), torch.ones(4), 8)


def test_what_is_inside_is_refused_by_its_own_name() -> None:
    bad = Scaled(torch.empty(4, 2, device="meta"), torch.ones(4), 8)
    with pytest.raises(UnsupportedStateError, match="meta") as info:
        describe("w", bad, kind=EntryKind.REPLICATED, group=ALONE)
    assert info.value.tensor == "w.data_"


def test_jagged_nested_tensors() -> None:
    def jagged() -> torch.Tensor:
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)

    values = describe("n", jagged(), kind=EntryKind.REPLICATED, group=ALONE)
    by_name = {value.fqn: value for value in values}
    stored = by_name["n._values"]
    assert isinstance(stored, TensorValue)
    assert stored.shape == (6, 3)
    # The symbolic size differs from tensor to tensor; the description must not.
    assert description_of(jagged()) == description_of(jagged())


def test_parts_must_not_take_another_values_name() -> None:
    flat = flatten({"w": make(), "w.scale": torch.ones(1)})
    with pytest.raises(UnsupportedStateError) as info:
        describe_leaves(flat.leaves, group=ALONE)
    assert (info.value.kind, info.value.tensor) == ("duplicate_key", "w.scale")
