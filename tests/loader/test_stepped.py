"""Indices with steps: what is read apart, and in which portions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_engine.loader.slicing import select
from dcp_engine.loader.stepped import MAX_BOXES, positions_apart, read_portions


@given(data=st.data())
def test_portions_are_what_numpy_selects(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), max_size=3)))
    stored = np.arange(math.prod(shape)).reshape(shape)
    index = tuple(
        data.draw(st.slices(size).filter(lambda s: (s.step or 1) > 0) | st.integers(0, size - 1))
        for size in shape
    )
    selection = select(shape, index, name="t")
    if not math.prod(selection.counts):
        return
    apart = tuple(data.draw(st.booleans()) for _ in shape)
    max_bytes = data.draw(st.integers(1, 64))
    result = np.full(selection.counts, -1)
    for portion in read_portions(selection, apart, itemsize=1, max_bytes=max_bytes):
        held = np.full(portion.held, -1)
        for box, place in portion.boxes():
            source = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            assert (held[place] == -1).all()
            held[place] = stored[source]
        assert (result[portion.where] == -1).all()
        result[portion.where] = held[portion.kept]
        assert held.size <= max_bytes or portion.held == result[portion.where].shape
    assert np.array_equal(result.reshape(selection.shape), stored[index])


def test_memory_is_bounded_by_portions_not_by_the_extent() -> None:
    selection = select((16, 64 << 20), (slice(None), slice(None, None, 1 << 14)), name="t")
    portions = list(read_portions(selection, (False, False), itemsize=1, max_bytes=32 << 20))
    assert len(portions) == 32
    assert max(math.prod(portion.held) for portion in portions) <= 32 << 20


def test_boxes_are_described_a_few_at_a_time() -> None:
    selection = select((100, 1 << 20), (slice(None), slice(None, None, 4)), name="t")
    first = next(read_portions(selection, (False, True), itemsize=1, max_bytes=1))
    assert first.held == (100, MAX_BOXES)
    assert len(list(first.boxes())) == MAX_BOXES


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (np.s_[:, :], (False, False)),
        (np.s_[::2, :], (False, False)),  # 4 KiB between
        (np.s_[::17, :], (True, False)),  # 64 KiB between
        (np.s_[::16, :], (False, False)),
        (np.s_[::16, :1], (False, False)),
        (np.s_[::17, ::2], (True, False)),
        (np.s_[::5000, :], (False, False)),  # one position only
        (np.s_[:, ::512], (False, False)),
        (np.s_[:, ::1023], (False, False)),
        (np.s_[:, 5], (False, False)),
    ],
)
def test_what_is_read_apart(index: tuple[slice | int, ...], expected: tuple[bool, ...]) -> None:
    selection = select((4096, 1024), index, name="t")
    assert positions_apart(selection, (4096, 1024), itemsize=4, max_gap=1 << 16) == expected


def test_chunks_that_nothing_is_wanted_of_are_not_read() -> None:
    selection = select((1000, 64), (slice(None), slice(None, None, 8)), name="t")
    assert positions_apart(selection, (1000, 8), itemsize=4, max_gap=1 << 16) == (False, True)
    assert positions_apart(selection, (1000, 9), itemsize=4, max_gap=1 << 16) == (False, False)
