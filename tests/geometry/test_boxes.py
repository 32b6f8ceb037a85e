"""Boxes against brute force on sets of elements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.geometry.boxes import (
    MAX_VOLUME,
    contains,
    find_overlaps,
    intersect,
    split_rows,
    volumes,
)

SETTINGS = settings(max_examples=80, deadline=None)


@st.composite
def box_set(draw: st.DrawFn, dims: int, most: int = 12) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(0, most))
    box = st.tuples(*[st.tuples(st.integers(0, 6), st.integers(0, 4)) for _ in range(dims)])
    boxes = draw(st.lists(box, min_size=n, max_size=n))
    columns = np.array(boxes, np.int64).reshape(n, dims, 2)
    return columns[:, :, 0], columns[:, :, 1]


def elements(offsets: np.ndarray, sizes: np.ndarray) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, o + s) for o, s in zip(offsets, sizes, strict=True))))


@SETTINGS
@given(st.data(), st.integers(1, 3))
def test_volumes_and_intersections_count_elements(data: st.DataObject, dims: int) -> None:
    a_offsets, a_sizes = data.draw(box_set(dims))
    b_offsets, b_sizes = data.draw(box_set(dims))
    n = min(len(a_offsets), len(b_offsets))
    a_offsets, a_sizes, b_offsets, b_sizes = (
        x[:n] for x in (a_offsets, a_sizes, b_offsets, b_sizes)
    )
    result = intersect(a_offsets, a_sizes, b_offsets, b_sizes)
    for i in range(n):
        a, b = elements(a_offsets[i], a_sizes[i]), elements(b_offsets[i], b_sizes[i])
        assert volumes(a_sizes)[i] == len(a)
        assert result.some[i] == bool(a & b)
        assert elements(result.offsets[i], result.sizes[i]) == a & b
        if b:
            assert contains(a_offsets, a_sizes, b_offsets, b_sizes)[i] == (b <= a)


def test_volume_saturates_instead_of_wrapping() -> None:
    sizes = np.array([[1 << 40, 1 << 40], [1 << 32, 1 << 32], [-5, 3], [7, 3]])
    assert volumes(sizes).tolist() == [MAX_VOLUME, MAX_VOLUME, 0, 21]


def test_contains_is_not_fooled_by_hostile_numbers() -> None:
    huge = np.iinfo(np.int64).max
    outer = np.zeros((1, 1), np.int64), np.full((1, 1), 8)
    for offset, size in [(huge, huge), (huge - 1, 4), (-1, 2), (0, -1), (-huge, huge), (9, 0)]:
        assert not contains(*outer, np.array([[offset]]), np.array([[size]]))[0]
    assert contains(*outer, np.array([[8]]), np.array([[0]]))[0]


@SETTINGS
@given(st.data(), st.integers(0, 3), st.booleans())
def test_overlaps_are_those_of_brute_force(
    data: st.DataObject, dims: int, several_tensors: bool
) -> None:
    wanted = data.draw(box_set(dims))
    stored = data.draw(box_set(dims, 20))
    w, s = len(wanted[0]), len(stored[0])
    tensors = st.integers(3, 5) if several_tensors else st.just(0)
    wt = np.array(data.draw(st.lists(tensors, min_size=w, max_size=w)), np.int64)
    stt = np.array(data.draw(st.lists(tensors, min_size=s, max_size=s)), np.int64)
    kwargs = {"wanted_tensor": wt, "stored_tensor": stt} if several_tensors else {}
    rows, hits = find_overlaps(*wanted, *stored, **kwargs)
    expected = [
        (i, j)
        for i in range(w)
        for j in range(s)
        if wt[i] == stt[j]
        and elements(wanted[0][i], wanted[1][i]) & elements(stored[0][j], stored[1][j])
    ]
    assert list(zip(rows.tolist(), hits.tolist(), strict=True)) == expected


def test_overlaps_with_coordinates_too_large_for_plain_keys() -> None:
    far = 1 << 61
    offsets = np.array([[0], [far], [5]])
    sizes = np.array([[10], [10], [3]])
    tensor = np.array([0, 1, 2])
    wanted = np.array([[7], [far + 9], [0], [8], [far + 10]])
    rows, hits = find_overlaps(
        wanted,
        np.ones_like(wanted),
        offsets,
        sizes,
        wanted_tensor=np.array([0, 1, 2, 2, 1]),
        stored_tensor=tensor,
    )
    assert (rows.tolist(), hits.tolist()) == ([0, 1], [0, 1])


def test_a_million_boxes_in_a_grid_are_searched_by_the_better_dimension() -> None:
    n = 1000
    grid = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1).reshape(-1, 2)
    offsets, sizes = grid * 4, np.full((n * n, 2), 4)
    wanted = np.array([[0, 10], [3990, 0], [17, 17]])
    extents = np.array([[4000, 1], [2, 4000], [1, 1]])
    rows, hits = find_overlaps(wanted, extents, offsets, sizes)
    assert np.bincount(rows).tolist() == [1000, 1000, 1]
    assert set((offsets[hits[rows == 0], 1]).tolist()) == {8}
    assert hits[rows == 2].tolist() == [4 * n + 4]


@SETTINGS
@given(
    st.lists(st.integers(1, 9), min_size=0, max_size=3),
    st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
)
def test_row_split_tiles_the_box(sizes: list[int], shares: list[int]) -> None:
    offsets = np.arange(len(sizes), dtype=np.int64) + 3
    out_offsets, out_sizes = split_rows(offsets, np.array(sizes, np.int64), shares)
    assert len(out_offsets) == len(shares)
    if not sizes:
        return
    parts = [elements(o, s) for o, s in zip(out_offsets, out_sizes, strict=True)]
    assert set().union(*parts) == elements(offsets, np.array(sizes))
    assert sum(map(len, parts)) == int(np.prod(sizes))
    dim = next((d for d, n in enumerate(sizes) if n != 1), 0)
    for part, share in zip(out_sizes[:, dim], shares, strict=True):
        assert abs(part - share / sum(shares) * sizes[dim]) <= 1


@pytest.mark.parametrize("shares", [[1, 0, 0], [0, 0, 1], [0, 1, 0]])
def test_a_share_of_zero_gets_nothing(shares: list[int]) -> None:
    _, sizes = split_rows(np.array([0, 0]), np.array([5, 2]), shares)
    assert sizes[:, 0].tolist() == [5 * s for s in shares]
