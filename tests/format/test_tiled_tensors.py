"""Tensors of a few chunks each, decoded all at once, against the same ones decoded one by one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import CheckpointError
from dcp_engine.format import chunk_tables
from dcp_engine.format.dtypes import code_of
from dcp_engine.format.tensor_section import TensorSectionReader
from tests.format.builders import Chunk, Row, files, section

DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
FILE_BYTES = 400


def grid(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Chunk]:
    """The boxes between ``cuts`` in row-major order, one behind the other in file 0."""
    axes = []
    for size, inner in zip(shape, cuts, strict=True):
        borders = sorted({0, size, *(c for c in inner if c < size)})
        axes.append(list(itertools.pairwise(borders)))
    chunks: list[Chunk] = []
    for box in itertools.product(*axes):
        offsets = tuple(begin for begin, _ in box)
        sizes = tuple(end - begin for begin, end in box)
        chunks.append((offsets, sizes, len(chunks) % 2, 3 * len(chunks)))
    return chunks


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[Row], list[bool]]:
    """Tensors cut at will, and which of them are as a writer makes them."""
    result: list[Row] = []
    orderly: list[bool] = []
    for number in range(draw(st.integers(1, 8))):
        shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
        cuts = [draw(st.lists(st.integers(1, 5), max_size=3)) for _ in shape]
        chunks = grid(shape, cuts)
        changed = draw(st.sampled_from(["", "", "", "permuted", "twice", "lost", "behind"]))
        if changed == "permuted":
            chunks = draw(st.permutations(chunks))
        elif changed == "twice":
            chunks = [*chunks, chunks[-1]]
        elif changed == "lost":
            chunks = chunks[1:]
        elif changed == "behind":
            chunks = [*chunks[:-1], (*chunks[-1][:3], FILE_BYTES)]
        dtype = draw(st.sampled_from(DTYPES))
        result.append(Row(name=f"t{number}", shape=shape, dtype=dtype, chunks=chunks))
        orderly.append(not changed)
    return result, orderly


def one_by_one(reader: TensorSectionReader, row: int) -> Any:
    tensor = reader.tensor(row)
    try:
        return tensor, tensor.chunks
    except CheckpointError:
        return tensor, None


def compare(reader: TensorSectionReader, asked: Sequence[int]) -> set[int]:
    """Check what is found at once; returns the positions that were."""
    positions: set[int] = set()
    for found in reader.tiled(np.array(asked, np.int64)):
        assert found.at.tolist() == sorted(set(found.at.tolist()) - positions)
        ends = np.cumsum(found.counts)
        for number, position in enumerate(found.at.tolist()):
            positions.add(position)
            tensor, chunks = one_by_one(reader, asked[position])
            assert chunks is not None, "what is refused by itself is not let through with others"
            ndim = len(tensor.shape)
            assert int(found.ndims[number]) == ndim
            assert tuple(found.shapes[number, :ndim].tolist()) == tensor.shape
            assert (found.shapes[number, ndim:] == 1).all()
            assert found.dtypes[number] == code_of(tensor.dtype)
            own = slice(ends[number] - found.counts[number], ends[number])
            assert (found.offsets[own, :ndim] == chunks.offsets).all()
            assert (found.sizes[own, :ndim] == chunks.sizes).all()
            assert (found.offsets[own, ndim:] == 0).all() and (found.sizes[own, ndim:] == 1).all()
            assert found.file[own].tolist() == chunks.file.tolist()
            assert found.start[own].tolist() == chunks.start.tolist()
    return positions


@settings(max_examples=120, deadline=None)
@given(case=rows(), data=st.data())
def test_all_at_once_is_one_by_one(case: tuple[list[Row], list[bool]], data: st.DataObject) -> None:
    made, orderly = case
    reader = TensorSectionReader(section(made).data, files(FILE_BYTES, FILE_BYTES), complete=True)
    asked = data.draw(st.lists(st.integers(-1, len(made) - 1), max_size=12))
    found = compare(reader, asked)
    for position, row in enumerate(asked):
        if row < 0:
            assert position not in found
        elif orderly[row]:
            _, chunks = one_by_one(reader, row)
            assert (position in found) == (chunks is not None)


COLUMNS = st.one_of(
    st.integers(-2, 7),
    st.just(1 << 70),
    st.lists(st.integers(-1, 7), max_size=4),
    st.just([0, 1 << 64]),
    st.sampled_from(["0:2", "2:-1", "5:-9", "0:0", "3", "1:4611686018427387904", ""]),
    st.sampled_from([None, True, 1.5, {}, [[1]]]),
)


@settings(max_examples=150, deadline=None)
@given(tables=st.lists(st.lists(COLUMNS, max_size=8), min_size=3, max_size=3), data=st.data())
def test_whatever_stands_in_a_table(tables: list[list[Any]], data: st.DataObject) -> None:
    shapes = ((4,), (4, 3), (2, 2, 2))
    made = [
        Row(name=f"t{at}", shape=shape, chunks=grid(shape, [[2], *[[]] * (len(shape) - 1)]))
        for at, shape in enumerate(shapes)
    ]
    made.append(Row(name="last", shape=(4,), chunks=grid((4,), [[2]])))
    fields = json.loads(section(made).data)
    for row in data.draw(st.sets(st.integers(0, 2))):
        columns = fields["tables"][row]
        for at, value in enumerate(tables[row]):
            if at < len(columns):
                columns[at] = value
            else:
                columns.append(value)
    text = json.dumps(fields, separators=(",", ":")).encode()
    reader = TensorSectionReader(text, files(FILE_BYTES, FILE_BYTES), complete=True)
    compare(reader, [0, 1, 2, 3])


def test_long_tables_and_many_dimensions_are_left_to_a_look_each() -> None:
    long = grid((3000,), [range(3000)])
    many = (2, *[1] * chunk_tables.MAX_DIMENSIONS)
    made = [
        Row(name="long", shape=(3000,), dtype=torch.uint8, chunks=long),
        Row(name="many", shape=many, chunks=grid(many, [[1], *[[]] * (len(many) - 1)])),
        Row(name="short", shape=(4,), chunks=grid((4,), [[2]])),
    ]
    reader = TensorSectionReader(section(made).data, files(10_000, 10_000), complete=True)
    assert compare(reader, [0, 1, 2]) == {2}
    assert all(one_by_one(reader, row)[1] is not None for row in range(3))


def test_what_is_decoded_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_tables, "BATCH_BYTES", 40)
    made = [Row(name=f"t{at}", shape=(4,), chunks=grid((4,), [[2]])) for at in range(9)]
    reader = TensorSectionReader(section(made).data, files(100, 100), complete=True)
    parts = list(reader.tiled(np.arange(9)))
    assert len(parts) > 2
    assert [at for part in parts for at in part.at.tolist()] == list(range(9))


def test_one_ranks_manifest_of_several_is_left_to_a_look_each() -> None:
    made = [Row(name="t", shape=(4,), chunks=grid((4,), [[2]]))]
    reader = TensorSectionReader(section(made).data, files(100, 100), complete=False)
    assert list(reader.tiled(np.arange(1))) == []


def test_a_shape_that_is_absurd_is_left_to_be_refused() -> None:
    shape = (1 << 40, 1 << 40)
    halves: list[Chunk] = [
        ((0, 0), (1 << 39, 1 << 40), 0, 0),
        ((1 << 39, 0), (1 << 39, 1 << 40), 0, 0),
    ]
    reader = TensorSectionReader(
        section([Row(name="huge", shape=shape, chunks=halves)]).data,
        files(FILE_BYTES),
        complete=True,
    )
    assert compare(reader, [0]) == set()
