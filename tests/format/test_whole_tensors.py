"""Tensors of one chunk each, looked up all at once, against the same ones looked up one by one."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import CheckpointError
from dcp_engine.format.dtypes import code_of
from dcp_engine.format.tensor_section import TensorSectionReader
from tests.format.builders import Row, files, section

DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
FILE_BYTES = 100


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Whole tensors, some behind the end of their file, tables of two chunks, and aliases."""
    result: list[Row] = []
    for number in range(draw(st.integers(0, 8))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        start, file = draw(st.integers(0, 120)), draw(st.integers(0, 1))
        kind = draw(st.sampled_from(["whole", "halves", "alias"]))
        name = f"t{number}"
        if kind == "alias" and result and result[0].alias < 0:
            first = result[0]
            result.append(Row(name=name, shape=first.shape, dtype=first.dtype, alias=0))
        elif kind == "halves" and shape and shape[0] > 1:
            half = (shape[0] // 2, *shape[1:])
            rest = (shape[0] - half[0], *shape[1:])
            zeros = (0,) * len(shape)
            chunks = [(zeros, half, 0, 0), ((half[0], *zeros[1:]), rest, 1, 0)]
            result.append(Row(name=name, shape=shape, dtype=dtype, chunks=chunks))
        else:
            chunk = ((0,) * len(shape), shape, file, start)
            result.append(Row(name=name, shape=shape, dtype=dtype, chunks=[chunk]))
    return result


@settings(max_examples=80, deadline=None)
@given(rows=rows(), data=st.data())
def test_all_at_once_is_one_by_one(rows: list[Row], data: st.DataObject) -> None:
    reader = TensorSectionReader(section(rows).data, files(FILE_BYTES, FILE_BYTES), complete=True)
    asked = data.draw(st.lists(st.integers(-1, len(rows) - 1), max_size=12))
    found = reader.whole(np.array(asked, np.int64))
    by_position = dict(zip(found.at.tolist(), range(len(found.at)), strict=True))
    assert list(by_position) == sorted(by_position)
    for position, row in enumerate(asked):
        if row < 0 or rows[row].alias >= 0 or len(rows[row].chunks) != 1:
            assert position not in by_position
            continue
        tensor = reader.tensor(row)
        try:
            chunks = tensor.chunks
        except CheckpointError as error:
            assert error.kind == "chunk_out_of_bounds"
            assert position not in by_position
            continue
        at = by_position[position]
        ndim = int(found.ndims[at])
        assert tuple(found.shapes[at, :ndim].tolist()) == tensor.shape
        assert (found.shapes[at, ndim:] == 1).all()
        assert found.dtypes[at] == code_of(tensor.dtype)
        assert (found.file[at], found.start[at]) == (chunks.file[0], chunks.start[0])


def test_absurd_shapes_are_left_to_be_refused() -> None:
    shape = (1 << 40, 1 << 40)
    rows = [
        Row(name="huge", shape=shape, chunks=[((0, 0), shape, 0, 0)]),
        Row(name="empty", shape=(0, 1 << 50), chunks=[((0, 0), (0, 1 << 50), 0, 0)]),
    ]
    reader = TensorSectionReader(section(rows).data, files(FILE_BYTES), complete=True)
    assert reader.whole(np.array([0, 1])).at.tolist() == [1]
