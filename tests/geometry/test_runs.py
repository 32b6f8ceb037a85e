"""Runs against numpy slicing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.geometry.runs import box_runs


@st.composite
def case(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    sizes = [draw(st.integers(0, n)) for n in shape]
    offsets = [draw(st.integers(0, n - s)) for n, s in zip(shape, sizes, strict=True)]
    return shape, offsets, sizes, draw(st.sampled_from([1, 2, 8]))


@settings(max_examples=150, deadline=None)
@given(case())
def test_runs_are_the_bytes_of_the_slice(c: tuple[list[int], list[int], list[int], int]) -> None:
    shape, offsets, sizes, itemsize = c
    total = int(np.prod(shape)) * itemsize
    array = np.arange(total, dtype=np.int64).reshape(*shape, itemsize)
    wanted = array[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].reshape(-1)
    runs = box_runs(shape, offsets, sizes, itemsize)
    starts = runs.starts()
    assert len(starts) == runs.count
    got = (starts[:, None] + np.arange(runs.length)).reshape(-1)
    assert got.tolist() == wanted.tolist()
    assert runs.nbytes == len(wanted)
    if len(wanted):
        assert runs.span == (wanted[0], wanted[-1] + 1)
        # As long as can be: no run is followed by one that continues it.
        assert not (np.diff(starts) == runs.length).any()
    cut = runs.count // 2
    assert [*runs.starts(0, cut), *runs.starts(cut)] == starts.tolist()


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes", "length", "counts"),
    [
        ((4, 6), (1, 0), (2, 6), 48, ()),
        ((4, 6), (0, 2), (4, 3), 12, (4,)),
        ((4, 6, 2), (0, 2, 0), (4, 3, 2), 24, (4,)),
        ((4, 6, 2), (0, 0, 1), (4, 6, 1), 4, (24,)),
        ((4, 6, 2), (0, 1, 1), (4, 5, 1), 4, (4, 5)),
        ((), (), (), 4, ()),
    ],
)
def test_dimensions_melt(
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    length: int,
    counts: tuple[int, ...],
) -> None:
    runs = box_runs(shape, offsets, sizes, 4)
    assert (runs.length, runs.counts) == (length, counts)


def test_empty_box_has_no_runs() -> None:
    runs = box_runs((4, 4), (1, 2), (0, 2), 4)
    assert (runs.count, runs.nbytes, runs.starts().tolist()) == (0, 0, [])
    assert runs.span[0] == runs.span[1]


def test_a_huge_box_costs_a_few_numbers() -> None:
    runs = box_runs((1 << 30, 1 << 10), (0, 1), (1 << 30, 1), 2)
    assert runs.count == 1 << 30
    assert runs.starts((1 << 30) - 2).tolist() == [((1 << 30) - i) * 2048 + 2 for i in (2, 1)]
