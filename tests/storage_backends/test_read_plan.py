"""Cutting boxes, and carrying blocks over, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.format.digest import block_count, block_digests
from storage_backends.block_digester import BlockDigester
from storage_backends.read_plan import BoxCutter
from storage_backends.tensor_bytes import contiguous_slices, memory_of


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=0, max_size=4))
    within = [draw(st.integers(0, n - 1)) for n in sizes]
    lengths = [draw(st.integers(1, n - w)) for n, w in zip(sizes, within, strict=True)]
    return sizes, within, lengths


@settings(max_examples=150, deadline=None)
@given(boxes(), st.integers(4, 200), st.integers(0, 100), st.booleans())
def test_parts_are_the_box(
    box: tuple[list[int], list[int], list[int]], max_span: int, max_gap: int, contiguous: bool
) -> None:
    sizes, within, lengths = box
    chunk = np.arange(int(np.prod(sizes)), dtype=np.int32).reshape(sizes)
    wanted = chunk[tuple(slice(w, w + n) for w, n in zip(within, lengths, strict=True))]
    filled = np.full(lengths, -1, np.int32)
    strides = [s // 4 for s in filled.strides] if contiguous else None
    cutter = BoxCutter(max_span=max_span, max_gap=max_gap)
    flat = chunk.reshape(-1)
    for part in cutter.cut(sizes, within, lengths, 4, strides):
        where = tuple(slice(b, b + n) for b, n in zip(part.begin, part.lengths, strict=True))
        inside = chunk[
            tuple(
                slice(w + b, w + b + n)
                for w, b, n in zip(within, part.begin, part.lengths, strict=True)
            )
        ]
        assert part.first == int(inside.min()) * 4
        assert part.end == int(inside.max()) * 4 + 4
        assert (filled[where] == -1).all()
        filled[where] = inside
        used = np.sort(inside.reshape(-1))
        if part.direct:
            assert contiguous
            assert (flat[part.first // 4 : part.end // 4] == inside.reshape(-1)).all()
        else:
            assert part.end - part.first <= max_span
            assert (np.diff(used) * 4 - 4 <= max_gap).all()
    assert (filled == wanted).all()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=5000), st.lists(st.integers(0, 900), max_size=20))
def test_digests_do_not_depend_on_how_bytes_arrive(data: bytes, cuts: list[int]) -> None:
    expected = block_digests(data, 512)
    made = np.zeros(block_count(len(data), 512), np.uint64)
    digester = BlockDigester(made, 512)
    at = 0
    for cut in cuts:
        digester.update(memoryview(data)[at : at + cut])
        at += cut
    digester.update(memoryview(data)[at:])
    digester.finish()
    assert (made == expected).all()


def test_a_digester_knows_when_bytes_are_missing() -> None:
    digester = BlockDigester(np.zeros(3, np.uint64), 512)
    digester.update(memoryview(bytes(600)))
    with pytest.raises(ValueError, match="2 blocks"):
        digester.finish()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=0, max_size=4), st.integers(4, 300), st.randoms())
def test_slices_are_the_tensor(shape: list[int], limit: int, random: object) -> None:
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape)
    order = list(range(tensor.ndim))
    random.shuffle(order)  # type: ignore[attr-defined]
    tensor = tensor.permute(order)
    slices = list(contiguous_slices(tensor, limit))
    joined = b"".join(memory_of(part) for part in slices)
    assert joined == bytes(memory_of(tensor.contiguous()))
    memory = range(tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes())
    copies = [part for part in slices if part.data_ptr() not in memory]
    assert all(part.nbytes <= limit for part in copies)
