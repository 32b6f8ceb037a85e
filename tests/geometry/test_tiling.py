"""The tiling check against counting elements, and at the size of a large job."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.geometry.tiling import find_tiling_fault, find_tiling_faults

SETTINGS = settings(max_examples=120, deadline=None)
Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]


def cut_up(draw: st.DrawFn, offsets: tuple[int, ...], sizes: tuple[int, ...], depth: int) -> Boxes:
    """A random partition by cuts, not aligned with each other."""
    cuttable = [d for d, n in enumerate(sizes) if n > 1]
    if not depth or not cuttable or draw(st.integers(0, 4)) == 0:
        return [(offsets, sizes)]
    d = draw(st.sampled_from(cuttable))
    at = draw(st.integers(1, sizes[d] - 1))
    left = (*sizes[:d], at, *sizes[d + 1 :])
    right = (*sizes[:d], sizes[d] - at, *sizes[d + 1 :])
    moved = (*offsets[:d], offsets[d] + at, *offsets[d + 1 :])
    return cut_up(draw, offsets, left, depth - 1) + cut_up(draw, moved, right, depth - 1)


@st.composite
def partition(draw: st.DrawFn) -> tuple[tuple[int, ...], Boxes]:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    boxes = cut_up(draw, (0,) * len(shape), shape, 5)
    return shape, draw(st.permutations(boxes))


def columns(boxes: Boxes, dims: int) -> tuple[np.ndarray, np.ndarray]:
    flat = np.array(boxes, np.int64).reshape(len(boxes), 2, dims)
    return flat[:, 0], flat[:, 1]


def coverage(shape: tuple[int, ...], boxes: Boxes) -> np.ndarray:
    count = np.zeros(shape, np.int64)
    for offsets, sizes in boxes:
        count[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    return count


@SETTINGS
@given(partition())
def test_partitions_tile(case: tuple[tuple[int, ...], Boxes]) -> None:
    shape, boxes = case
    assert find_tiling_fault(np.array(shape), *columns(boxes, len(shape))) is None


@SETTINGS
@given(partition(), st.data())
def test_every_change_is_found_and_the_witness_is_true(
    case: tuple[tuple[int, ...], Boxes], data: st.DataObject
) -> None:
    shape, boxes = case
    change = data.draw(st.sampled_from(["drop", "repeat", "shift", "swap"]))
    i = data.draw(st.integers(0, len(boxes) - 1))
    j = data.draw(st.integers(0, len(boxes) - 1))
    boxes = list(boxes)
    if change == "drop":
        del boxes[i]
    elif change == "repeat":
        boxes.append(boxes[i])
    elif change == "shift":  # stays inside
        offsets = tuple(
            data.draw(st.integers(0, n - s)) for n, s in zip(shape, boxes[i][1], strict=True)
        )
        boxes[i] = (offsets, boxes[i][1])
    else:  # the same volume in all, at another place
        boxes[i] = boxes[j]
    count = coverage(shape, boxes)
    fault = find_tiling_fault(np.array(shape), *columns(boxes, len(shape)))
    if (count == 1).all():
        assert fault is None
        return
    assert fault is not None
    covered = int(count[fault.point])
    assert (fault.kind == "overlap") == (covered > 1)
    assert (fault.kind == "gap") == (covered == 0)
    if fault.kind == "overlap":
        assert len(fault.rows) == min(covered, 8)
        for row in fault.rows:
            offsets, sizes = boxes[row]
            assert all(o <= p < o + s for o, p, s in zip(offsets, fault.point, sizes, strict=True))


@SETTINGS
@given(st.lists(partition(), min_size=1, max_size=4), st.data())
def test_many_tensors_at_once(
    cases: list[tuple[tuple[int, ...], Boxes]], data: st.DataObject
) -> None:
    broken = set()
    shapes, tensor, offsets, sizes = [], [], [], []
    for k, (shape, boxes) in enumerate(cases):
        if data.draw(st.booleans()):
            boxes = boxes[1:]
            broken.add(k)
        pad = 3 - len(shape)
        shapes.append((*shape, *[1] * pad))
        for o, s in boxes:
            tensor.append(k)
            offsets.append((*o, *[0] * pad))
            sizes.append((*s, *[1] * pad))
    faults = find_tiling_faults(
        np.array(shapes),
        np.array(tensor, np.int64),
        np.array(offsets, np.int64).reshape(-1, 3),
        np.array(sizes, np.int64).reshape(-1, 3),
    )
    assert {fault.tensor for fault in faults} == broken
    assert [fault.tensor for fault in faults] == sorted(broken)


def test_outside_is_named_first() -> None:
    fault = find_tiling_fault(np.array([4, 4]), np.array([[0, 0], [2, 0]]), np.array([[2, 4]] * 2))
    assert fault is None
    fault = find_tiling_fault(np.array([4, 4]), np.array([[0, 0], [2, 1]]), np.array([[2, 4]] * 2))
    assert fault is not None
    assert (fault.kind, fault.point, fault.rows) == ("outside", (2, 1), (1,))


def test_tensors_without_elements_need_no_boxes() -> None:
    nothing = np.empty((0, 2), np.int64)
    assert find_tiling_fault(np.array([0, 5]), nothing, nothing) is None
    fault = find_tiling_fault(np.array([1, 1]), nothing, nothing)
    assert fault is not None
    assert (fault.kind, fault.point) == ("gap", (0, 0))


def test_scalars() -> None:
    one = np.empty((1, 0), np.int64)
    assert find_tiling_fault(np.empty(0, np.int64), one, one) is None
    two = np.empty((2, 0), np.int64)
    fault = find_tiling_fault(np.empty(0, np.int64), two, two)
    assert fault is not None
    assert (fault.kind, fault.rows) == ("overlap", (0, 1))


def test_shapes_near_the_limit_of_64_bits() -> None:
    n = 1 << 61
    offsets = np.array([[0, 0], [n - 3, 0], [n - 3, 1]])
    sizes = np.array([[n - 3, 2], [3, 1], [3, 1]])
    assert find_tiling_fault(np.array([n, 2]), offsets, sizes) is None
    assert find_tiling_fault(np.array([n, 2]), offsets[:2], sizes[:2]) is not None


def test_a_quarter_million_boxes_in_a_grid_and_in_no_grid() -> None:
    n = 512
    grid = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1).reshape(-1, 2)
    offsets, sizes = grid * 3, np.full((n * n, 2), 3)
    shape = np.array([3 * n, 3 * n])
    assert find_tiling_fault(shape, offsets, sizes) is None
    # Brickwork: odd rows moved by one, so that no vertical line cuts it.
    odd = offsets[:, 0] % 2 == 1
    bricks, lengths = offsets.copy(), sizes.copy()
    bricks[odd & (offsets[:, 1] > 0), 1] += 1
    lengths[odd & (offsets[:, 1] == 0), 1] += 1
    lengths[odd & (offsets[:, 1] == 3 * (n - 1)), 1] -= 1
    assert find_tiling_fault(shape, bricks, lengths) is None
    bricks[1000] = bricks[1001]
    fault = find_tiling_fault(shape, bricks, lengths)
    assert fault is not None
    assert fault.kind in ("gap", "overlap")
