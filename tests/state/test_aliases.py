"""Tied weights are found; what only looks alike is not."""

from __future__ import annotations

from typing import Any

import torch

from dcp_engine.planning.columns import NO_ALIAS, UNDECIDED_ALIAS
from dcp_engine.state.adapters import GroupRanks, describe
from dcp_engine.state.aliases import find_aliases
from dcp_engine.state.values import Box, EntryKind, MeshLayout, TensorValue


def values(*tensors: torch.Tensor, kind: EntryKind = EntryKind.REPLICATED) -> list[Any]:
    return [
        value
        for i, tensor in enumerate(tensors)
        for value in describe(str(i), tensor, kind=kind, group=GroupRanks())
    ]


def test_exact_sharing_is_an_alias_of_the_first() -> None:
    w = torch.nn.Parameter(torch.ones(4, 4))
    column = find_aliases(values(torch.ones(4, 4), w, w.data, w.detach().view(4, 4), w[:]))
    assert column.tolist() == [NO_ALIAS, NO_ALIAS, 1, 1, 1]
    assert column.dtype == "int32"


def test_other_views_of_the_memory_are_not() -> None:
    w = torch.ones(4, 4)
    views = [w, w.t(), w[:2], w[1:], w.view(16), w.view(torch.int32), w.view(2, 8)]
    assert set(find_aliases(values(*views)).tolist()) == {NO_ALIAS}


def test_strides_of_dimensions_of_size_one_say_nothing() -> None:
    base = torch.ones(8)
    a, b = base.as_strided((1, 8), (8, 1)), base.as_strided((1, 8), (3, 1))
    assert find_aliases(values(a, b)).tolist() == [NO_ALIAS, 0]


def test_without_elements_nothing_can_be_told() -> None:
    empty = torch.ones(0, 3)
    assert find_aliases(values(empty, empty)).tolist() == [UNDECIDED_ALIAS] * 2


def test_kind_and_layout_must_agree() -> None:
    w = torch.ones(4)
    mixed = values(w) + values(w, kind=EntryKind.PER_RANK) + values(w, kind=EntryKind.PER_RANK)
    assert find_aliases(mixed).tolist() == [NO_ALIAS, NO_ALIAS, 1]

    def sharded(offset: int, ranks: tuple[int, ...]) -> TensorValue:
        return TensorValue(
            fqn="s",
            kind=EntryKind.SHARDED,
            dtype=w.dtype,
            shape=(8,),
            boxes=(Box(offsets=(offset,), sizes=(4,)),),
            tensors=(w,),
            layout=MeshLayout(mesh_shape=(2,), ranks=ranks, placements=("S(0)",)),
        )

    column = find_aliases(
        [sharded(0, (0, 1)), sharded(4, (0, 1)), sharded(0, (2, 3)), sharded(0, (0, 1))]
    )
    assert column.tolist() == [NO_ALIAS, NO_ALIAS, NO_ALIAS, 0]
