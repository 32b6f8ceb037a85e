"""Fingerprints, the plan cache, replica comparison, who writes without talking, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from dcp_engine.errors import UnsupportedStateError, UsageError
from dcp_engine.planning.arrays import segment_positions, segment_starts, stable_order
from dcp_engine.planning.cache import PlanCache
from dcp_engine.planning.collective_free import own_share
from dcp_engine.planning.columns import LocalPlan
from dcp_engine.planning.divergence import format_ranks
from dcp_engine.planning.fingerprint import DIGEST_BYTES, Options, fingerprint
from dcp_engine.planning.replicas import compare_details, needs_details, summarise
from dcp_engine.state.values import EntryKind, MeshLayout, TensorValue
from tests.planning.layouts import obj, per_rank, replicated, sharded, source, tensor

OPTIONS: Options = {"dedup_to_lowest_rank": False, "files_per_rank": 1, "world_size": 4}


def base(rank: int = 1) -> list[object]:
    return [
        sharded("a", (8, 4), rank, [4], [0]),
        replicated("b", (3,), dtype=torch.float64),
        per_rank("rng", (5,)),
        obj("o"),
        obj("p", EntryKind.PER_RANK),
    ]


def plan_of(*changes: tuple[int, object], aliases: list[int] | None = None) -> LocalPlan:
    values = base()
    for at, value in changes:
        values[at] = value
    return source(values, 1, aliases=aliases).plan  # type: ignore[arg-type]


CHANGES: dict[str, Callable[[], LocalPlan]] = {
    "key": lambda: plan_of((1, replicated("c", (3,), dtype=torch.float64))),
    "kind": lambda: plan_of((1, tensor("b", (3,), base()[1].boxes, dtype=torch.float64))),  # type: ignore[attr-defined]
    "dtype": lambda: plan_of((1, replicated("b", (3,)))),
    "shape": lambda: plan_of((1, replicated("b", (3, 1), dtype=torch.float64))),
    "box": lambda: plan_of((0, sharded("a", (8, 4), 2, [4], [0]))),
    "placement": lambda: plan_of((0, sharded("a", (8, 4), 1, [4], [1]))),
    "aliases": lambda: dataclasses.replace(plan_of(), aliases=np.array([-1, 0, -1], np.int32)),
    "undecided": lambda: plan_of(aliases=[-1, -2, -1]),
    "object name": lambda: plan_of((3, obj("q"))),
    "object kind": lambda: plan_of((3, obj("o", EntryKind.PER_RANK))),
    "order": lambda: plan_of((3, obj("p", EntryKind.PER_RANK)), (4, obj("o"))),
    "rank": lambda: source(base(), 2).plan,  # type: ignore[arg-type]
    "nesting": lambda: dataclasses.replace(plan_of(), containers=b"other"),
    "missing": lambda: source(base()[1:], 1).plan,  # type: ignore[arg-type]
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_ingredient_changes_the_fingerprint(change: str) -> None:
    before = fingerprint(plan_of(), OPTIONS)
    assert before == fingerprint(plan_of(), dict(reversed(OPTIONS.items())))
    assert len(before) == DIGEST_BYTES
    assert fingerprint(CHANGES[change](), OPTIONS) != before


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_fingerprint(name: str) -> None:
    changed = {**OPTIONS, name: 7}
    assert fingerprint(plan_of(), changed) != fingerprint(plan_of(), OPTIONS)


def test_cache_keeps_what_was_used_last() -> None:
    cache: PlanCache[tuple[bytes, ...], str] = PlanCache(2)
    cache.put((b"1",), "one")
    cache.put((b"2",), "two")
    assert cache.get((b"1",)) == "one"
    cache.put((b"3",), "three")
    assert cache.get((b"2",)) is None
    assert cache.get((b"1",)) == "one"
    assert len(cache) == 2
    cache.discard((b"1",))
    cache.discard((b"1",))
    assert cache.get((b"1",)) is None
    cache.clear()
    assert len(cache) == 0
    with pytest.raises(ValueError, match="0 plans"):
        PlanCache(0)


def test_replicas_that_agree_need_no_details() -> None:
    table = {"a": 1, "b": 2**64 - 1}
    same = [summarise(table), summarise(dict(reversed(table.items()))), summarise({})]
    assert not needs_details(same)
    assert needs_details([summarise(table), summarise({**table, "a": 3})])
    assert needs_details([summarise(table), summarise({"a": 1})])
    assert summarise({"a": 1, "b": 2}) != summarise({"ab": 1, "": 2})


def test_details_name_keys_and_ranks() -> None:
    tables = [{"a": 1, "b": 5}, {"a": 1, "b": 6}, {"a": 2, "c": 0}, {"a": 1, "b": 5}]
    comparison = compare_details(tables)
    assert comparison.differing == {"a": ((0, 1, 3), (2,)), "b": ((0, 3), (1,))}
    told = comparison.describe()
    assert told == "'a' (ranks [0, 1, 3] against rank 2), 'b' (ranks [0, 3] against rank 1)"
    assert compare_details([{"x": 1}, {"y": 2}]).describe() == ""
    many = compare_details([{str(i): 0 for i in range(12)}, {str(i): 1 for i in range(12)}])
    assert many.describe().endswith("and 4 more")


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), min_size=1, max_size=5))
def test_summaries_never_hide_a_difference(tables: list[dict[str, int]]) -> None:
    differs = any(
        one[key] != two[key] for one in tables for two in tables for key in one.keys() & two.keys()
    )
    assert bool(compare_details(tables).differing) == differs
    if differs:
        assert needs_details([summarise(table) for table in tables])


def test_format_ranks() -> None:
    assert format_ranks([3]) == "rank 3"
    assert format_ranks([2, 1, 2]) == "ranks [1, 2]"
    assert format_ranks(range(20)) == "ranks [0, 1, 2, 3, 4, 5, 6, 7, ...] (20 in all)"


def on_mesh(fqn: str, rank: int, placements: tuple[str, ...]) -> TensorValue:
    """A tensor on a 2 x 3 mesh."""
    cuts = [0 if p == "S(0)" else None for p in placements]
    value = sharded(fqn, (6,), rank, [2, 3], cuts)
    layout = MeshLayout(mesh_shape=(2, 3), ranks=tuple(range(6)), placements=placements)
    return structs.replace(value, layout=layout)


def writes(value: TensorValue, rank: int) -> bool:
    (left,) = own_share([value], rank=rank)
    assert left.fqn == value.fqn, "the name stays, whoever writes"
    assert isinstance(left, TensorValue)
    return bool(left.boxes)


@pytest.mark.parametrize(
    ("placements", "copies"), [(("R", "R"), 6), (("R", "S(0)"), 2), (("S(0)", "R"), 3)]
)
def test_without_talking_each_box_has_one_writer(placements: tuple[str, ...], copies: int) -> None:
    writers: set[tuple[int, ...]] = set()
    for number in range(40):
        held = [on_mesh(f"t{number}", rank, placements) for rank in range(6)]
        mine = [r for r, value in enumerate(held) if writes(value, r)]
        boxes = [held[rank].boxes[0] for rank in mine]
        assert sorted(box.offsets for box in boxes) == sorted({v.boxes[0].offsets for v in held})
        writers.add(tuple(mine))
    assert len(writers) == copies, "the name spreads the work over all copies"


def test_without_talking_plain_tensors_are_rank_zeros_and_objects_everybodys() -> None:
    values = [replicated("w", (2,)), obj("o"), per_rank("r", (2,))]
    assert own_share(values, rank=0) == values
    other = own_share(values, rank=1)
    assert not writes(values[0], 1)
    assert other[1:] == values[1:]
    shard = sharded("s", (4,), 1, [2], [0])
    assert own_share([shard], rank=1) == [shard]
    with pytest.raises(UsageError):
        own_share([on_mesh("t", 0, ("R", "R"))], rank=9)


def test_what_cannot_be_stored_is_refused_by_name() -> None:
    quantized = structs.replace(replicated("q", (2,)), dtype=torch.qint8)
    with pytest.raises(UnsupportedStateError) as caught:
        source([quantized], 3)
    assert (caught.value.tensor, caught.value.rank) == ("q", 3)
    huge = structs.replace(replicated("h", (2,)), shape=(1 << 40, 1 << 30), boxes=(), tensors=())
    with pytest.raises(UnsupportedStateError, match="2\\^60"):
        source([huge])
    with pytest.raises(UnsupportedStateError, match="UTF-8"):
        source([obj("\ud800")])


@given(st.lists(st.integers(0, 2**40)))
def test_stable_order_sorts_stably(keys: list[int]) -> None:
    array = np.array(keys, np.int64)
    assert stable_order(array).tolist() == sorted(range(len(keys)), key=lambda i: keys[i])


def test_segments() -> None:
    assert segment_starts(np.array([3, 3, 1, 1, 1, 3])).tolist() == [0, 2, 5]
    assert segment_starts(np.zeros(0, np.int64)).tolist() == []
    assert segment_positions(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]
    assert segment_positions(np.zeros(0, np.int64)).tolist() == []
