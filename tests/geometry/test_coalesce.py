"""Merged reads: everything is covered, nothing is read in vain beyond the bound."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.geometry.coalesce import coalesce, widen_to_blocks

SETTINGS = settings(max_examples=150, deadline=None)
runs = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 30)), max_size=30).map(sorted)


@SETTINGS
@given(runs, st.integers(0, 20), st.integers(1, 120))
def test_merged_reads_serve_their_runs(
    pairs: list[tuple[int, int]], max_gap: int, max_size: int
) -> None:
    starts = np.array([s for s, _ in pairs], np.int64)
    lengths = np.array([n for _, n in pairs], np.int64)
    reads = coalesce(starts, lengths, max_gap=max_gap, max_size=max_size)
    assert reads.first_run[0] == 0
    assert reads.first_run[-1] == len(pairs)
    for i, (start, nbytes) in enumerate(zip(reads.start, reads.nbytes, strict=True)):
        served = range(reads.first_run[i], reads.first_run[i + 1])
        assert len(served) > 0
        needed = {b for r in served for b in range(starts[r], starts[r] + lengths[r])}
        assert min(needed) == start
        assert max(needed) == start + nbytes - 1
        assert nbytes <= max_size or len(served) == 1
        missing = [b for b in range(start, start + nbytes) if b not in needed]
        gaps = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1) if missing else []
        assert all(len(gap) <= max_gap for gap in gaps)


@SETTINGS
@given(runs, st.integers(0, 20))
def test_without_a_size_limit_nothing_mergeable_stays_apart(
    pairs: list[tuple[int, int]], max_gap: int
) -> None:
    starts = np.array([s for s, _ in pairs], np.int64)
    lengths = np.array([n for _, n in pairs], np.int64)
    reads = coalesce(starts, lengths, max_gap=max_gap, max_size=1 << 40)
    ends = reads.start + reads.nbytes
    assert (reads.start[1:] - ends[:-1] > max_gap).all()


def test_no_runs() -> None:
    nothing = np.empty(0, np.int64)
    reads = coalesce(nothing, nothing, max_gap=1, max_size=1)
    assert (len(reads.start), reads.first_run.tolist()) == (0, [0])


def test_a_long_run_is_not_cut() -> None:
    reads = coalesce(np.array([0, 1000]), np.array([1000, 10]), max_gap=0, max_size=100)
    assert reads.nbytes.tolist() == [1000, 10]


@SETTINGS
@given(st.integers(1, 500), st.integers(1, 70), st.data())
def test_widened_runs_are_whole_blocks(chunk: int, block: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, chunk))
    length = data.draw(st.integers(0, chunk - start))
    new_starts, new_lengths = widen_to_blocks(
        np.array([start]), np.array([length]), chunk_nbytes=chunk, block_size=block
    )
    begin, end = int(new_starts[0]), int(new_starts[0] + new_lengths[0])
    if length == 0:
        assert (begin, end) == (start, start)
        return
    assert begin % block == 0
    assert end % block == 0 or end == chunk
    assert start - begin < block
    assert end - (start + length) < block
    assert begin <= start < start + length <= end <= chunk
