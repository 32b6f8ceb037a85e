"""The columnar global plan against the plain reference planner."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from dcp_engine.errors import InvalidPlanError, UsageError
from dcp_engine.format.dtypes import info
from dcp_engine.planning import arrays
from dcp_engine.planning.balance import BalanceOptions
from dcp_engine.planning.columns import GlobalPlan, RankAssignment
from dcp_engine.planning.global_plan import assignments, make_global_plan, make_own_plan
from dcp_engine.planning.local import LocalSource
from dcp_engine.state.values import Box, EntryKind, Value
from tests.planning import reference
from tests.planning.layouts import (
    content,
    local_plans,
    obj,
    per_rank,
    replicated,
    sharded,
    source,
    states,
    tensor,
)

TINY = BalanceOptions(finest=1, coarsest=16)
"""Cuts even the small tensors of these tests."""


def written_bytes(
    sources: Sequence[LocalSource], parts: Sequence[RankAssignment]
) -> dict[tuple[int, int], bytes]:
    """What the ranks would write: each file's bytes, by rank and number."""
    files: dict[tuple[int, int], bytes] = {}
    for rank, (own, mine) in enumerate(zip(sources, parts, strict=True)):
        for number in range(len(mine.file_data_bytes)):
            files[rank, number] = b""
        for row in range(len(mine.source)):
            at = int(mine.source[row])
            memory = own.tensors[at]
            ndim = memory.ndim
            within, sizes = mine.within[row, :ndim].tolist(), mine.sizes[row, :ndim].tolist()
            piece = memory[tuple(slice(w, w + s) for w, s in zip(within, sizes, strict=True))]
            raw = piece.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            key = (rank, int(mine.file[row]))
            assert len(files[key]) == mine.start[row], "pieces lie gapless, in order"
            assert mine.start[row] % memory.element_size() == 0, "aligned to its element"
            assert len(raw) == mine.nbytes[row]
            files[key] += raw
        for number, size in enumerate(mine.file_data_bytes.tolist()):
            assert len(files[rank, number]) == size
    return files


def read_back(plan: GlobalPlan, files: dict[tuple[int, int], bytes], row: int) -> torch.Tensor:
    """Tensor ``row`` put together from the files, as the plan's chunk table says."""
    table, chunks = plan.tensors, plan.chunks
    ndim = int(table.ndims[row])
    dtype = info(int(table.dtypes[row])).dtype
    shape = table.shapes[row, :ndim].tolist()
    result = torch.zeros(shape, dtype=dtype)
    times = torch.zeros(shape, dtype=torch.int64)
    stored = row if plan.aliases[row] < 0 else int(plan.aliases[row])
    for chunk in np.flatnonzero(chunks.tensor == stored).tolist():
        file = int(chunks.file[chunk])
        begin, size = int(chunks.start[chunk]), int(chunks.nbytes[chunk])
        raw = files[int(plan.files.rank[file]), int(plan.files.number[file])][begin:][:size]
        offsets = chunks.offsets[chunk, :ndim].tolist()
        sizes = chunks.sizes[chunk, :ndim].tolist()
        where = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        result[where] = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(sizes)
        times[where] += 1
    assert (times == 1).all(), "every element is stored exactly once"
    return result


def check(
    ranks: Sequence[Sequence[Value]],
    plan: GlobalPlan,
    expected: reference.ReferencePlan,
    *,
    split: bool = True,
) -> None:
    sources = [source(values, rank) for rank, values in enumerate(ranks)]
    parts = list(assignments(plan, [own.plan for own in sources]))
    files = written_bytes(sources, parts)
    table, chunks = plan.tensors, plan.chunks
    assert list(zip(table.names, table.owners.tolist(), strict=True)) == expected.names
    for row, key in enumerate(expected.names):
        ndim, dtype = int(table.ndims[row]), info(int(table.dtypes[row])).dtype
        assert torch.equal(
            read_back(plan, files, row), content(table.shapes[row, :ndim].tolist(), dtype)
        )
        pieces = np.flatnonzero(chunks.tensor == row)
        writers = plan.files.rank[chunks.file[pieces]].tolist()
        held = expected.held[key]
        inside = []
        for piece, writer in zip(pieces.tolist(), writers, strict=True):
            offsets, sizes = chunks.offsets[piece, :ndim], chunks.sizes[piece, :ndim]
            box = next(
                (o, s)
                for o, s in held
                if all(
                    a <= b and b + c <= a + d
                    for a, d, b, c in zip(o, s, offsets.tolist(), sizes.tolist(), strict=True)
                )
            )
            assert writer in held[box], "only a holder can write"
            inside.append(box)
        for box, holders in held.items():
            assert split or inside.count(box) == 1
            if len(holders) == 1:
                assert inside.count(box) == 1, "what one rank holds is not cut"
        order = list(zip(*(chunks.offsets[pieces, d].tolist() for d in range(ndim)), strict=True))
        assert order == sorted(order), "chunks are sorted by offsets"
    assert chunks.tensor.tolist() == sorted(chunks.tensor.tolist())
    powers = np.minimum(np.where(chunks.nbytes, chunks.nbytes & -chunks.nbytes, 4096), 4096)
    assert not (chunks.start % powers).any(), "aligned as the size is, up to a page"


@settings(max_examples=120, deadline=None)
@given(states(), st.integers(1, 3), st.booleans())
def test_plan_stores_every_element_once(
    ranks: list[list[Value]], files_per_rank: int, lowest: bool
) -> None:
    expected = reference.plan(ranks)
    plan = make_global_plan(
        local_plans(ranks),
        coordinator_rank=len(ranks) - 1,
        files_per_rank=files_per_rank,
        dedup_to_lowest_rank=lowest,
        balance=TINY,
    )
    check(ranks, plan, expected, split=not lowest)
    assert np.bincount(plan.files.rank, minlength=1).max(initial=0) <= files_per_rank
    placed = dict(
        zip(
            zip(plan.objects.names, plan.objects.kinds.tolist(), strict=True),
            plan.objects.owners.tolist(),
            strict=True,
        )
    )
    for (name, owner), holders in expected.objects.items():
        if owner < 0:
            last = len(ranks) - 1
            prefer = last in holders and not lowest
            assert placed[name, EntryKind.REPLICATED] == (last if prefer else min(holders))
    owned = [o for n, o in zip(plan.objects.names, plan.objects.owners.tolist(), strict=True)]
    assert len(owned) == len(expected.objects)


@settings(max_examples=80, deadline=None)
@given(states(), st.data())
def test_what_does_not_fit_is_refused_as_the_reference_does(
    ranks: list[list[Value]], data: st.DataObject
) -> None:
    spots = [
        (r, i)
        for r, values in enumerate(ranks)
        for i, value in enumerate(values)
        if hasattr(value, "boxes") and value.boxes
    ]
    if not spots:
        return
    rank, at = data.draw(st.sampled_from(spots))
    value = ranks[rank][at]
    box = value.boxes[0]
    change = data.draw(st.sampled_from(["drop", "shift", "shrink", "shape", "dtype"]))
    if change == "drop":
        new = structs.replace(value, boxes=(), tensors=())
    elif change in ("shift", "shrink"):
        if not box.sizes:
            return
        dim = data.draw(st.integers(0, len(box.sizes) - 1))
        step = data.draw(st.sampled_from([-1, 1]))
        offsets, sizes = list(box.offsets), list(box.sizes)
        if change == "shift":
            offsets[dim] += step
        else:
            sizes[dim] += step
        if 0 in sizes:
            return
        changed = Box(offsets=tuple(offsets), sizes=tuple(sizes))
        new = structs.replace(value, boxes=(changed, *value.boxes[1:]))
    elif change == "shape":
        if value.kind is EntryKind.PER_RANK:
            return
        new = structs.replace(value, shape=(*value.shape, 1), boxes=(), tensors=())
    else:
        new = structs.replace(value, dtype=torch.float64)
    ranks[rank][at] = new
    try:
        reference.plan(ranks)
    except reference.Refused as refused:
        with pytest.raises(InvalidPlanError) as caught:
            make_global_plan(local_plans(ranks), coordinator_rank=0)
        assert caught.value.tensor == refused.name
        # A box at another place leaves a gap and an overlap; either is a right answer.
        geometric = {"plan_gap", "plan_overlap"}
        assert caught.value.kind == refused.kind or {caught.value.kind, refused.kind} == geometric
    else:
        make_global_plan(local_plans(ranks), coordinator_rank=0)


@settings(max_examples=30, deadline=None)
@given(states())
def test_same_input_same_plan(ranks: list[list[Value]]) -> None:
    first = make_global_plan(local_plans(ranks), coordinator_rank=0, balance=TINY)
    again = make_global_plan(local_plans(ranks), coordinator_rank=0, balance=TINY)
    for name in ("tensor", "offsets", "sizes", "file", "start", "nbytes", "source"):
        assert np.array_equal(getattr(first.chunks, name), getattr(again.chunks, name))
    assert first.tensors.names == again.tensors.names
    assert first.objects.names == again.objects.names


@settings(max_examples=60, deadline=None)
@given(states(), st.integers(1, 9), st.integers(1, 3))
def test_blocks_of_rows_make_no_difference(
    ranks: list[list[Value]], rows: int, files_per_rank: int
) -> None:
    plans = local_plans(ranks)

    def columns() -> list[np.ndarray]:
        plan = make_global_plan(
            plans, coordinator_rank=0, files_per_rank=files_per_rank, balance=TINY
        )
        return [*vars(plan.chunks).values(), *vars(plan.files).values()]

    whole = columns()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "_BLOCK", rows)
        in_blocks = columns()
    for one, other in zip(whole, in_blocks, strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


def test_divergence_names_tensor_and_the_ranks_of_each_variant() -> None:
    ranks = [[replicated("w", (2,))], [replicated("w", (3,))], [replicated("w", (2,))]]
    with pytest.raises(InvalidPlanError) as caught:
        make_global_plan(local_plans(ranks), coordinator_rank=0)
    assert caught.value.kind == "plan_divergence"
    assert caught.value.tensor == "w"
    assert "float32 [2] on ranks [0, 2]; replicated float32 [3] on rank 1" in str(caught.value)


def test_tensor_on_one_rank_and_object_on_another() -> None:
    with pytest.raises(InvalidPlanError) as caught:
        make_global_plan(local_plans([[replicated("x", (2,))], [obj("x")]]), coordinator_rank=0)
    assert caught.value.tensor == "x"
    assert "an object on rank 1" in str(caught.value)


def test_per_rank_and_replicated_objects_under_one_name() -> None:
    ranks = [[obj("x")], [obj("x", EntryKind.PER_RANK)]]
    with pytest.raises(InvalidPlanError, match="per-rank"):
        make_global_plan(local_plans(ranks), coordinator_rank=0)


def test_gap_names_element_and_ranks() -> None:
    ranks = [[tensor("w", (4, 2), [Box(offsets=(2 * r, 0), sizes=(1, 2))])] for r in range(2)]
    with pytest.raises(InvalidPlanError) as caught:
        make_global_plan(local_plans(ranks), coordinator_rank=0)
    assert caught.value.kind == "plan_gap"
    assert "element [1, 0] of shape [4, 2]" in str(caught.value)
    assert "ranks [0, 1]" in str(caught.value)


@pytest.mark.parametrize(
    ("boxes", "kind"),
    [
        ([((0, 0), (1, 1)), ((0, 1), (2, 1))], "plan_gap"),
        ([((0, 0), (2, 1)), ((0, 1), (1, 1))], "plan_gap"),
        ([((0, 0), (1, 2)), ((1, 1), (1, 1))], "plan_gap"),
        ([((0, 0), (1, 1)), ((1, 0), (1, 2))], "plan_gap"),
        ([((0, 0), (2, 1)), ((0, 1), (2, 1)), ((1, 0), (1, 2))], "plan_overlap"),
        ([((0, 0), (1, 2)), ((0, 1), (2, 1)), ((1, 0), (1, 1))], "plan_overlap"),
    ],
)
def test_boxes_that_are_nearly_a_grid(
    boxes: list[tuple[tuple[int, int], tuple[int, int]]], kind: str
) -> None:
    values: list[Value] = [tensor("w", (2, 2), [Box(offsets=o, sizes=s) for o, s in boxes])]
    with pytest.raises(InvalidPlanError) as caught:
        make_global_plan(local_plans([values]), coordinator_rank=0)
    assert caught.value.kind == kind


def test_overlap_names_boxes_and_ranks() -> None:
    boxes = [Box(offsets=(0,), sizes=(3,)), Box(offsets=(2,), sizes=(2,))]
    ranks = [[tensor("w", (4,), [box])] for box in boxes]
    with pytest.raises(InvalidPlanError) as caught:
        make_global_plan(local_plans(ranks), coordinator_rank=0)
    assert caught.value.kind == "plan_overlap"
    assert "[0:3] (rank 0) and [2:4] (rank 1)" in str(caught.value)


def test_pinwheel_is_tiled_though_it_is_no_grid() -> None:
    boxes = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    values: list[Value] = [
        tensor("w", (3, 3), [Box(offsets=o, sizes=s) for o, s in boxes]),
    ]
    plan = make_global_plan(local_plans([values]), coordinator_rank=0)
    check([values], plan, reference.plan([values]))


def test_objects_only_and_nothing_at_all() -> None:
    plan = make_global_plan(local_plans([[obj("a")], [obj("a"), obj("b")]]), coordinator_rank=1)
    assert plan.objects.names == ("a", "b")
    assert plan.objects.owners.tolist() == [1, 1]
    assert len(plan.files.rank) == 0
    empty = make_global_plan(local_plans([[], []]), coordinator_rank=0)
    assert [part.objects for part in assignments(empty, local_plans([[], []]))] == [(), ()]


def test_aliases_hold_only_where_all_ranks_that_can_tell_agree() -> None:
    def rank(number: int, aliases: list[int]) -> list[object]:
        values = [sharded(name, (4, 2), number, [2], [0]) for name in ("a", "b", "c")]
        return [source(values, number, aliases=aliases).plan]

    plans = [*rank(0, [-1, 0, 0]), *rank(1, [-1, 0, -1])]
    plan = make_global_plan(plans, coordinator_rank=0)  # type: ignore[arg-type]
    assert plan.aliases.tolist() == [-1, 0, -1]
    assert set(plan.chunks.tensor.tolist()) == {0, 2}


def test_alias_chains_end_at_what_is_stored_and_undecided_ranks_do_not_count() -> None:
    values = [replicated(name, (4,)) for name in ("a", "b", "c")]
    empty = [tensor(n, (4,), [], kind=EntryKind.REPLICATED) for n in ("a", "b", "c")]
    plans = [source(values, 0, aliases=[-1, 0, 1]).plan, source(empty, 1, aliases=[-2] * 3).plan]
    plan = make_global_plan(plans, coordinator_rank=0)
    assert plan.aliases.tolist() == [-1, 0, 0]
    assert plan.chunks.tensor.tolist() == [0]


def test_alias_of_another_shape_is_stored_on_its_own() -> None:
    values = [replicated("a", (4,)), replicated("b", (2, 2))]
    plan = make_global_plan([source(values, 0, aliases=[-1, 0]).plan], coordinator_rank=0)
    assert plan.aliases.tolist() == [-1, -1]


def test_same_memory_but_other_boxes_is_no_alias() -> None:
    values = [sharded("a", (4, 4), 0, [2], [0]), sharded("b", (4, 4), 0, [2], [1])]
    assert source(values, 0, aliases=[-1, 0]).plan.aliases.tolist() == [-1, -1]


def test_a_box_that_one_rank_lists_twice_is_written_once() -> None:
    box = Box(offsets=(0,), sizes=(4,))
    values = [tensor("w", (4,), [box, box])]
    plan = make_global_plan(local_plans([values, values]), coordinator_rank=0)
    assert plan.chunks.nbytes.tolist() == [16]


def test_files_split_by_bytes_and_alignment_falls() -> None:
    values: list[Value] = [
        replicated("bytes", (64,), dtype=torch.uint8),
        replicated("doubles", (64,), dtype=torch.int64),
        replicated("floats", (64,)),
        replicated("more", (64,)),
    ]
    plans = local_plans([values])
    plan = make_global_plan(plans, coordinator_rank=0, files_per_rank=2)
    mine = next(assignments(plan, plans))
    assert [source(values).names[i] for i in mine.source] == ["doubles", "floats", "more", "bytes"]
    assert mine.file.tolist() == [0, 1, 1, 1]
    assert mine.start.tolist() == [0, 0, 256, 512]
    assert mine.file_data_bytes.tolist() == [512, 576]


def test_whole_pages_come_first_whatever_their_elements() -> None:
    values: list[Value] = [
        replicated("norm", (100,)),
        replicated("half a page of doubles", (256,), dtype=torch.int64),
        replicated("pages of bytes", (8192,), dtype=torch.uint8),
        replicated("pages", (3, 1024)),
        replicated("odd", (3,), dtype=torch.uint8),
    ]
    plans = local_plans([values])
    mine = next(assignments(make_global_plan(plans, coordinator_rank=0), plans))
    names = [source(values).names[i] for i in mine.source]
    assert names == ["pages of bytes", "pages", "half a page of doubles", "norm", "odd"]
    assert mine.start.tolist() == [0, 8192, 20480, 22528, 22928]


def test_a_new_file_begins_before_a_header_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcp_engine.planning.layout.HEADER_LIMIT", 1000)
    values: list[Value] = [replicated("x" * 300 + str(i), (2,)) for i in range(7)]
    plan = make_global_plan(local_plans([values]), coordinator_rank=0)
    assert len(plan.files.rank) >= 3
    assert plan.files.number.tolist() == list(range(len(plan.files.rank)))
    per_file = np.bincount(plan.chunks.file)
    assert per_file.max() <= 3
    check([values], plan, reference.plan([values]))


def test_arguments_that_make_no_sense() -> None:
    plans = local_plans([[replicated("w", (2,))]])
    with pytest.raises(UsageError):
        make_global_plan(plans, coordinator_rank=0, files_per_rank=0)
    plan = make_global_plan(plans, coordinator_rank=0)
    with pytest.raises(UsageError):
        assignments(plan, [*plans, *plans])
    used = dataclasses.replace(plan, chunks=dataclasses.replace(plan.chunks, source=None))
    with pytest.raises(UsageError):
        assignments(used, plans)


def test_own_plan_writes_all_a_rank_has() -> None:
    values: list[Value] = [
        sharded("w", (5, 2), 1, [2], [0]),
        per_rank("rng", (3,), dtype=torch.uint8),
        obj("o"),
    ]
    own = source(values, 1)
    plan, mine = make_own_plan(own.plan, rank=1, world_size=2)
    assert plan.world_size == 2
    assert plan.files.rank.tolist() == [1]
    assert plan.tensors.owners.tolist() == [-1, 1]
    assert mine.objects == ("o",)
    assert mine.nbytes.tolist() == [16, 3]
    assert math.prod(own.tensors[int(mine.source[0])].shape) == 4
