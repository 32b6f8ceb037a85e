"""Many tensors planned at once, against the same plan made tensor by tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import CheckpointError
from dcp_engine.format.lazy_maps import TensorMap
from dcp_engine.format.manifest import Manifest, decode_manifest
from dcp_engine.planning.load_parts import LoadParts
from dcp_engine.planning.load_plan import LoadSource, make_load_columns
from dcp_engine.planning.load_together import plan_together
from dcp_engine.state.values import Box, TensorValue
from tests.format.builders import Chunk, Content, Row, files
from tests.planning.layouts import part, replicated, tensor

FILE_BYTES = 4096


def cut(draw: st.DrawFn, shape: Sequence[int]) -> list[Box]:
    """A grid of boxes that tiles ``shape``, as device meshes make them."""
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    dims = [draw(st.sampled_from([None, *range(len(shape))])) for _ in mesh]
    boxes = dict.fromkeys(part(shape, mesh, dims, at) for at in range(int(np.prod(mesh))))
    return [box for box in boxes if 0 not in box.sizes]


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[Row], list[TensorValue]]:
    stored: list[Row] = []
    wanted: list[TensorValue] = []
    position = [0, 0]
    for number in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
        dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
        chunks: list[Chunk] = []
        for box in cut(draw, shape):
            file = draw(st.integers(0, 1))
            chunks.append((box.offsets, box.sizes, file, position[file]))
            position[file] += int(np.prod(box.sizes)) * dtype.itemsize
        damage = draw(st.sampled_from([*[""] * 8, "lost", "twice", "same bytes"]))
        if damage == "lost":
            chunks = chunks[:-1]
        elif damage == "twice":
            chunks = [*chunks, chunks[0]]
        elif damage == "same bytes":
            chunks = [(*chunk[:2], 0, 0) for chunk in chunks]
        name = f"t{number}"
        if chunks:
            stored.append(Row(name=name, shape=shape, dtype=dtype, chunks=chunks))
            if draw(st.booleans()):
                alias = Row(name=f"{name}'", shape=shape, dtype=dtype, alias=len(stored) - 1)
                stored.append(alias)
                name = draw(st.sampled_from([name, alias.name]))
        boxes = draw(st.lists(st.sampled_from(cut(draw, shape)), max_size=4, unique=True))
        value = tensor(name, shape, boxes, dtype=dtype)
        if draw(st.booleans()) and draw(st.booleans()):
            value = replicated(name, shape, dtype=dtype)
        wrong = draw(st.sampled_from([*[""] * 8, "dtype", "shape", "name"]))
        if wrong == "dtype":
            value = replicated(name, shape, dtype=torch.int32)
        elif wrong == "shape":
            value = replicated(name, (*shape, 2), dtype=dtype)
        elif wrong == "name":
            value = replicated(f"{name}?", shape, dtype=dtype)
        wanted.append(value)
    return stored, wanted


def rows_of(source: LoadSource) -> list[tuple[Any, ...]]:
    columns = source.columns
    found = []
    for row in range(len(columns.file)):
        ndim = int(columns.ndims[row])
        boxes = (
            columns.chunk_offsets,
            columns.chunk_sizes,
            columns.within,
            columns.lengths,
            columns.dest_within,
        )
        assert (columns.lengths[row, ndim:] == 1).all()
        found.append(
            (
                columns.names[int(columns.tensor[row])],
                int(columns.itemsize[row]),
                int(columns.file[row]),
                int(columns.chunk_start[row]),
                *(tuple(column[row, :ndim].tolist()) for column in boxes),
                id(source.tensors[int(columns.dest[row])]),
            )
        )
    return sorted(found)


def outcome(wanted: Sequence[TensorValue], manifest: Manifest) -> Any:
    try:
        return rows_of(make_load_columns(wanted, manifest, rank=0, world_size=2))
    except CheckpointError as error:
        return error.kind, error.tensor, error.message


@settings(max_examples=120, deadline=None)
@given(loads())
def test_all_at_once_is_one_by_one(case: tuple[list[Row], list[TensorValue]]) -> None:
    stored, wanted = case
    data = Content(rows=stored, data_files=files(FILE_BYTES, FILE_BYTES)).encode()
    manifest = decode_manifest(data, checkpoint="here")
    assert isinstance(manifest.tensors, TensorMap)
    apart = replace(manifest, tensors=dict(manifest.tensors.items()))
    assert outcome(wanted, manifest) == outcome(wanted, apart)


def test_what_is_as_it_should_be_needs_no_look_of_its_own() -> None:
    shapes = ((6,), (6, 4), (6, 2, 2))
    halves = [
        Row(
            name=f"t{at}",
            shape=shape,
            chunks=[
                ((0,) * len(shape), (3, *shape[1:]), 0, 64 * at),
                ((3, *(0,) * (len(shape) - 1)), (3, *shape[1:]), 1, 64 * at),
            ],
        )
        for at, shape in enumerate(shapes)
    ]
    whole = Row(name="whole", shape=(6, 4), chunks=[((0, 0), (6, 4), 0, 1024)])
    data = Content(rows=[*halves, whole], data_files=files(FILE_BYTES, FILE_BYTES)).encode()
    manifest = decode_manifest(data, checkpoint="here")
    boxes = itertools.cycle([Box(offsets=(1,), sizes=(4,)), Box(offsets=(5,), sizes=(1,))])
    wanted = [
        tensor(
            row.name,
            row.shape,
            [
                Box(
                    offsets=(b.offsets[0], *(0,) * (len(row.shape) - 1)),
                    sizes=(*b.sizes, *row.shape[1:]),
                )
                for b in itertools.islice(boxes, 2)
            ],
        )
        for row in [*halves, whole]
    ]
    assert plan_together(wanted, manifest, LoadParts()) == []
    nothing = [tensor(row.name, row.shape, []) for row in halves]
    assert plan_together(nothing, manifest, LoadParts()) == []
