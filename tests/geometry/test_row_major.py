"""Ranges of elements against numpy's own row-major order."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.geometry.row_major import elements_before, range_boxes


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=4))
    within, lengths = [], []
    for size in shape:
        begin = draw(st.integers(0, size - 1))
        within.append(begin)
        lengths.append(draw(st.integers(1, size - begin)))
    return shape, within, lengths


@settings(max_examples=60, deadline=None)
@given(boxes(), st.data())
def test_elements_before_counts_what_comes_first(
    box: tuple[list[int], list[int], list[int]], data: st.DataObject
) -> None:
    shape, within, lengths = box
    position = data.draw(st.integers(0, math.prod(shape)))
    inside = np.zeros(shape, np.bool_)
    inside[tuple(slice(w, w + n) for w, n in zip(within, lengths, strict=True))] = True
    expected = int(inside.reshape(-1)[:position].sum())
    row = (
        np.array([column], np.int64).reshape(1, len(shape)) for column in (shape, within, lengths)
    )
    assert elements_before(*row, np.array([position])).tolist() == [expected]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=4), st.data())
def test_range_boxes_tile_the_range_in_order(sizes: list[int], data: st.DataObject) -> None:
    total = math.prod(sizes)
    begin = data.draw(st.integers(0, total))
    end = data.draw(st.integers(begin, total))
    numbered = np.arange(total).reshape(sizes)
    found = list(range_boxes(sizes, begin, end))
    pieces = [
        numbered[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))].reshape(-1)
        for offsets, lengths in found
    ]
    joined = np.concatenate([np.zeros(0, np.int64), *pieces])
    assert joined.tolist() == list(range(begin, end))
    assert len(found) <= max(1, 2 * len(sizes) - 1)
