"""The tiling check against a count of every element."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import DamagedCheckpointError
from dcp_engine.format.tiling import check_tiling, slabs_in_order

SETTINGS = settings(max_examples=200, deadline=None)
Box = tuple[tuple[int, ...], tuple[int, ...]]


def columns(boxes: list[Box], ndim: int) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.array([o for o, _ in boxes], np.int64).reshape(len(boxes), ndim)
    return offsets, np.array([s for _, s in boxes], np.int64).reshape(len(boxes), ndim)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, cut into boxes by cutting boxes again and again (not only grids)."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    boxes: list[Box] = [(tuple(0 for _ in shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        at = draw(st.integers(0, len(boxes) - 1))
        dim = draw(st.integers(0, len(shape) - 1))
        _, sizes = boxes[at]
        if sizes[dim] < 2:
            continue
        cut = draw(st.integers(1, sizes[dim] - 1))

        def part(begin: int, size: int, box: Box = boxes[at], dim: int = dim) -> Box:
            offsets, sizes = list(box[0]), list(box[1])
            offsets[dim] += begin
            sizes[dim] = size
            return tuple(offsets), tuple(sizes)

        boxes[at : at + 1] = [part(0, cut), part(cut, sizes[dim] - cut)]
    return shape, draw(st.permutations(boxes))


@SETTINGS
@given(tilings())
def test_tilings_pass(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    check_tiling(shape, *columns(boxes, len(shape)), tensor="w")


@SETTINGS
@given(tilings(), st.data())
def test_changed_tilings_pass_only_if_they_still_tile(
    case: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = case
    if data.draw(st.booleans()):
        boxes = sorted(boxes)  # as a writer orders them
    offsets, sizes = columns(boxes, len(shape))
    for _ in range(data.draw(st.integers(0, 3)) if shape else 0):
        row = data.draw(st.integers(0, len(boxes) - 1))
        dim = data.draw(st.integers(0, len(shape) - 1))
        sizes[row, dim] = data.draw(st.integers(0, shape[dim]))
        offsets[row, dim] = data.draw(st.integers(0, shape[dim] - int(sizes[row, dim])))
    counts = np.zeros(shape, np.int64)
    for offset, size in zip(offsets, sizes, strict=True):
        counts[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))] += 1
    tiles = bool((counts == 1).all()) and bool((sizes > 0).all())
    try:
        check_tiling(shape, offsets, sizes, tensor="w")
    except DamagedCheckpointError as error:
        assert not tiles
        assert error.kind in ("chunks_overlap", "manifest_invalid")
        assert error.tensor == "w"
    else:
        assert tiles


@SETTINGS
@given(st.data())
def test_what_a_mesh_makes_needs_no_random_points(data: st.DataObject) -> None:
    """Slabs, cut into slabs of their own: ragged, but in order."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))

    def cut(dim: int) -> list[Box]:
        if dim == len(shape):
            return [((), ())]
        borders = sorted(data.draw(st.sets(st.integers(1, shape[dim]))) | {0, shape[dim]})
        return [
            ((begin, *offsets), (end - begin, *sizes))
            for begin, end in pairwise(borders)
            for offsets, sizes in cut(dim + 1)
        ]

    boxes = cut(0)
    offsets, sizes = columns(boxes, len(shape))
    shapes, counts = np.array([shape], np.int64), np.array([len(boxes)])
    assert slabs_in_order(shapes, counts, offsets, sizes).all()
    check_tiling(shape, offsets, sizes, tensor="w")


def test_a_pinwheel_tiles() -> None:
    boxes = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1))]
    boxes.append(((1, 1), (1, 1)))
    check_tiling((3, 3), *columns(boxes, 2), tensor="w")
    boxes[-1] = boxes[0]
    with pytest.raises(DamagedCheckpointError):
        check_tiling((3, 3), *columns(boxes, 2), tensor="w")


def test_an_overlap_as_large_as_the_gap_is_an_overlap() -> None:
    boxes = [((0,), (2,)), ((1,), (2,))]
    with pytest.raises(DamagedCheckpointError) as caught:
        check_tiling((4,), *columns(boxes, 1), tensor="w")
    assert caught.value.kind == "chunks_overlap"


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1 << 40, 1 << 40, 0)])
def test_tensors_without_elements(shape: tuple[int, ...]) -> None:
    nothing = np.empty((0, len(shape)), np.int64)
    check_tiling(shape, nothing, nothing, tensor="w")
    whole = np.array([shape], np.int64)
    check_tiling(shape, np.zeros_like(whole), whole, tensor="w")
    with pytest.raises(DamagedCheckpointError):
        check_tiling(shape, np.zeros((2, len(shape)), np.int64), np.repeat(whole, 2, 0), tensor="w")


def test_scalars() -> None:
    one = np.empty((1, 0), np.int64)
    check_tiling((), one, one, tensor="w")
    for count in (0, 2):
        several = np.empty((count, 0), np.int64)
        with pytest.raises(DamagedCheckpointError):
            check_tiling((), several, several, tensor="w")


def test_many_dimensions_cost_no_more_than_their_number() -> None:
    # A sweep over corners would look at 2**60 of them.
    shape = (2,) * 60
    offsets, sizes = [], []
    for dim in range(60):
        offsets.append([0] * dim + [1] + [0] * (59 - dim))
        sizes.append([1] * dim + [1] + [2] * (59 - dim))
    offsets.append([0] * 60)
    sizes.append([1] * 60)
    check_tiling(shape, np.array(offsets), np.array(sizes), tensor="w")
    sizes[3] = sizes[4]
    with pytest.raises(DamagedCheckpointError):
        check_tiling(shape, np.array(offsets), np.array(sizes), tensor="w")


def test_sums_beyond_64_bits_do_not_wrap() -> None:
    shape = (1 << 60,)
    sizes = np.full((17, 1), 1 << 60)
    with pytest.raises(DamagedCheckpointError) as caught:
        check_tiling(shape, np.zeros_like(sizes), sizes, tensor="w")
    assert caught.value.kind == "chunks_overlap"


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_slabs_of_several_tensors_are_told_apart(data: st.DataObject) -> None:
    """What is said to be in order covers each element once, whoever its neighbours are."""
    ndim = data.draw(st.integers(1, 2))
    shapes, tensors = [], []
    for _ in range(data.draw(st.integers(1, 5))):
        shape = tuple(data.draw(st.integers(1, 3)) for _ in range(ndim))
        box = st.tuples(*(st.integers(0, n - 1) for n in shape)).flatmap(
            lambda at, shape=shape: st.tuples(
                st.just(at),
                st.tuples(*(st.integers(1, n - o) for o, n in zip(at, shape, strict=True))),
            )
        )
        rows = [((row, *(0,) * (ndim - 1)), (1, *shape[1:])) for row in range(shape[0])]
        tensors.append(data.draw(st.one_of(st.just(rows), st.lists(box, min_size=1, max_size=4))))
        shapes.append(shape)
    offsets, sizes = columns([box for boxes in tensors for box in boxes], ndim)
    counts = np.array([len(boxes) for boxes in tensors])
    found = slabs_in_order(np.array(shapes), counts, offsets, sizes)
    for shape, boxes, in_order in zip(shapes, tensors, found.tolist(), strict=True):
        alone = slabs_in_order(np.array([shape]), np.array([len(boxes)]), *columns(boxes, ndim))
        assert alone.tolist() == [in_order]
        held = np.zeros(shape, np.int64)
        for at, size in boxes:
            held[tuple(slice(o, o + n) for o, n in zip(at, size, strict=True))] += 1
        assert (held == 1).all() or not in_order
        by_rows = [((row, *(0,) * (ndim - 1)), (1, *shape[1:])) for row in range(shape[0])]
        assert in_order or boxes != by_rows
