"""Manifests come back as they were written."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import (
    DamagedCheckpointError,
    InvalidPlanError,
    UnsupportedStateError,
    UsageError,
)
from dcp_engine.format.digest import xxh3_128_hex
from dcp_engine.format.dtypes import DTYPES
from dcp_engine.format.json_columns import encode_column, encode_fields, expand_column
from dcp_engine.format.manifest import (
    FORMAT_VERSION,
    DataFile,
    DigestFile,
    ExtraFile,
    decode_manifest,
)
from tests.format.builders import SAVE_ID, Content, Row, body_of, files, full_content, section

SETTINGS = settings(max_examples=60, deadline=None)


def test_fields_are_values_and_lists_of_values() -> None:
    assert encode_fields({}) == b"{}"
    fields = {"a": b"1", "b": [b"2", b"[3]"], "c": [], "d": [b"4"]}
    assert encode_fields(fields) == b'{"a":1,"b":[2,[3]],"c":[],"d":[4]}'


def test_everything_comes_back() -> None:
    content = full_content()
    manifest = decode_manifest(content.encode(), checkpoint="step-1")
    assert manifest.version == FORMAT_VERSION
    assert manifest.save_id == SAVE_ID
    assert manifest.data_directory == f"data-{SAVE_ID}"
    assert manifest.world_size == 2
    assert manifest.time == content.time
    assert manifest.writers == {"dcp_engine": "0.1", "torch": "2.13"}
    assert manifest.user_metadata == content.user_metadata
    assert manifest.block_size == 65536
    assert (manifest.token, manifest.rank) == (None, None)
    assert list(manifest.tensors) == ["model.weight", "model.bias", "model.tied", "step", "empty"]
    assert list(manifest.objects) == ["lr", "big"]
    assert manifest.objects["lr"].inline == b"\x01N"
    big = manifest.objects["big"]
    assert (big.pickled, big.inline, big.file, big.start, big.nbytes) == (True, None, 0, 68, 32)
    assert {r: o.owner for r, o in manifest.per_rank_objects["seed"].items()} == {0: 0, 1: 1}
    assert {r: t.shape for r, t in manifest.per_rank_tensors["rng"].items()} == {0: (8,), 1: (4,)}
    assert manifest.data_files == tuple(content.data_files)
    assert manifest.data_files[1].name == "rank00001-00.safetensors"
    assert manifest.digest_file(1) == DigestFile(rank=1, size=101, xxh3_128="ab" * 16)
    assert manifest.digest_file(1).name == "rank00001.digests"
    assert manifest.extra_files == tuple(content.extra_files)
    assert manifest.nesting.path("model.bias") == ("model", "bias")
    manifest.validate()
    manifest.validate(["model.weight", "rng", "seed", "not there"])
    with pytest.raises(DamagedCheckpointError, match="rank 2"):
        manifest.digest_file(2)


def test_tensors_and_their_chunks() -> None:
    tensors = decode_manifest(full_content().encode()).tensors
    weight = tensors["model.weight"]
    assert (weight.dtype, weight.shape, weight.alias_of) == (torch.float32, (4, 6), None)
    chunks = weight.chunks
    assert chunks.offsets.tolist() == [[0, 0], [2, 0]]
    assert chunks.sizes.tolist() == [[2, 6], [2, 6]]
    assert chunks.file.tolist() == [0, 1]
    assert chunks.start.tolist() == [0, 0]
    assert chunks.nbytes.tolist() == [48, 48]
    assert (chunks.offsets.dtype, chunks.file.dtype) == (np.int64, np.int32)
    for array in (chunks.offsets, chunks.sizes, chunks.file, chunks.start, chunks.nbytes):
        assert not array.flags.writeable
    tied = tensors["model.tied"]
    assert tied.alias_of == "model.weight"
    assert tied.chunks.start.tolist() == chunks.start.tolist()
    assert tensors["empty"].chunks.offsets.shape == (0, 2)
    assert tensors["step"].chunks.offsets.shape == (1, 0)
    assert tensors["step"].chunks.nbytes.tolist() == [8]
    assert tensors["model.weight"] is weight
    assert "rng" not in tensors


def test_an_empty_checkpoint() -> None:
    manifest = decode_manifest(Content(world_size=1).encode())
    assert not manifest.tensors
    assert not manifest.objects
    assert not manifest.data_files
    manifest.validate()


def test_same_content_same_bytes() -> None:
    assert full_content().encode() == full_content().encode()


def test_the_digest_covers_all_bytes_ahead_of_it() -> None:
    data = full_content().encode()
    assert data.endswith(f',"manifest_xxh3_128":"{xxh3_128_hex(body_of(data))}"}}\n'.encode())
    assert len(data) - len(body_of(data)) == 57
    json.loads(data)


def test_names_may_be_any_valid_text() -> None:
    names = ["", "größe", "a\x00b", 'quote"', "\u2028", "__metadata__", "../x", "🙂"]
    rows = [Row(name=n, shape=(), chunks=[((), (), 0, 4 * i)]) for i, n in enumerate(names)]
    manifest = decode_manifest(Content(rows=rows, data_files=files(32)).encode())
    assert list(manifest.tensors) == names
    with pytest.raises(UnsupportedStateError, match="UTF-8"):
        section([Row(name="a", shape=()), Row(name="x\ud800", shape=())])


@pytest.mark.parametrize(
    "value", [{"a": (1,)}, {"a": math.nan}, {"a": object()}, {1: "a"}, {"a": b"x"}, {"a": "\ud800"}]
)
def test_user_metadata_that_json_would_change_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="user_metadata"):
        Content(user_metadata=value).encode()


@pytest.mark.parametrize(
    "alias",
    [
        Row(name="b", shape=(3,), alias=0),
        Row(name="b", shape=(2,), alias=0, dtype=torch.int32),
        Row(name="b", shape=(2, 1), alias=0),
        Row(name="b", shape=(2,), alias=0, owner=1),
        Row(name="b", shape=(2,), alias=1),
        Row(name="b", shape=(2,), alias=0, chunks=[((0,), (2,), 0, 0)]),
    ],
)
def test_aliases_that_a_reader_would_refuse_are_not_written(alias: Row) -> None:
    with pytest.raises(InvalidPlanError, match="alias") as caught:
        section([Row(name="a", shape=(2,), chunks=[((0,), (2,), 0, 0)]), alias])
    assert caught.value.tensor == "b"


def test_extra_names_that_a_reader_would_refuse_are_not_written() -> None:
    extra = ExtraFile(name="config.json", size=1, xxh3_128="00" * 16)
    with pytest.raises(UsageError, match="extra file"):
        Content(extra_files=[extra]).encode()


def test_every_dtype() -> None:
    rows, position = [], 0
    for entry in DTYPES.values():
        chunk = ((0,), (3,), 0, position)
        rows.append(Row(name=entry.name, shape=(3,), chunks=[chunk], dtype=entry.dtype))
        position += 3 * entry.itemsize
    manifest = decode_manifest(Content(rows=rows, data_files=files(position)).encode())
    for entry in DTYPES.values():
        assert manifest.tensors[entry.name].dtype is entry.dtype
        assert manifest.tensors[entry.name].chunks.nbytes.tolist() == [3 * entry.itemsize]
    manifest.validate()


@st.composite
def contents(draw: st.DrawFn) -> Content:
    """Tensors of any shape, cut into grids, spread over files."""
    position = [0] * draw(st.integers(1, 4))
    rows: list[Row] = []
    for i in range(draw(st.integers(0, 8))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
        boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
        for size in shape:
            cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
            spans = list(itertools.pairwise(cuts))
            boxes = [
                ((*offsets, begin), (*sizes, end - begin))
                for offsets, sizes in boxes
                for begin, end in spans
            ]
        chunks = []
        for offsets, sizes in boxes:
            file = draw(st.integers(0, len(position) - 1))
            chunks.append((offsets, sizes, file, position[file]))
            position[file] += math.prod(sizes) * dtype.itemsize + draw(st.integers(0, 3))
        rows.append(Row(name=f"t{i}", shape=shape, chunks=chunks, dtype=dtype))
    for i, row in enumerate(rows[:]):
        if draw(st.booleans()):
            rows.append(Row(name=f"a{i}", shape=row.shape, dtype=row.dtype, alias=i))
    return Content(rows=rows, data_files=files(*position), world_size=len(position))


@SETTINGS
@given(contents())
def test_tables_round_trip(content: Content) -> None:
    manifest = decode_manifest(content.encode())
    manifest.validate()
    for row in content.rows:
        tensor = manifest.tensors[row.name]
        assert (tensor.shape, tensor.dtype) == (row.shape, row.dtype)
        expected = content.rows[row.alias] if row.alias >= 0 else row
        chunks = tensor.chunks
        found = zip(
            map(tuple, chunks.offsets.tolist()),
            map(tuple, chunks.sizes.tolist()),
            chunks.file.tolist(),
            chunks.start.tolist(),
            strict=True,
        )
        assert list(found) == list(expected.chunks)


@SETTINGS
@given(
    st.lists(st.integers(0, 1 << 60), max_size=10)
    | st.builds(lambda a, s, n: [a + s * i for i in range(n)], *[st.integers(0, 99)] * 3)
    | st.builds(lambda a, s, n: [a + s * i for i in range(n)][::-1], *[st.integers(0, 99)] * 3)
)
def test_columns_round_trip(values: list[int]) -> None:
    data = encode_column(np.array(values, np.int64))
    assert expand_column(json.loads(data), len(values), (1 << 60) + 1, "x").tolist() == values
    assert len(data) <= len(json.dumps(values, separators=(",", ":")))


def test_a_chunk_of_a_sharded_tensor_takes_few_bytes() -> None:
    ranks, tensors = 64, 50
    rows = []
    for t in range(tensors):
        chunks = [
            ((r // 8 * 512, r % 8 * 1024), (512, 1024), r, 10_000_000 + t * 1_048_576)
            for r in range(ranks)
        ]
        rows.append(Row(name=f"layers.{t}.weight", shape=(4096, 8192), chunks=chunks))
    data = section(rows).data
    assert len(data) <= 32 * ranks * tensors


def test_small_whole_tensors_take_few_bytes() -> None:
    count = 1000
    rows = [
        Row(name=f"layers.{i}.weight", shape=(256,), chunks=[((0,), (256,), 0, 1024 * i)])
        for i in range(count)
    ]
    assert len(section(rows).data) <= 40 * count


def test_data_file_rows_are_as_given() -> None:
    given_files = [
        DataFile(rank=1, number=1, data_start=8192, size=10000),
        DataFile(rank=0, number=0, data_start=4096, size=4096),
        DataFile(rank=1, number=0, data_start=4096, size=5000),
    ]
    extra = [ExtraFile(name=f"extra/{i}/größe", size=i, xxh3_128="00" * 16) for i in range(3)]
    manifest = decode_manifest(Content(data_files=given_files, extra_files=extra).encode())
    assert list(manifest.data_files) == given_files
    assert list(manifest.extra_files) == extra
