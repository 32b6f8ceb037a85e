"""Headers of data files: the real safetensors library reads them, hostile ones are refused."""

from __future__ import annotations

import json
import pathlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file as load_torch

from dcp_engine.errors import CheckpointError, DamagedCheckpointError, UnsupportedStateError
from dcp_engine.format.dtypes import DTYPES, code_of, stored_shape
from dcp_engine.format.shard_file import (
    DATA_ALIGNMENT,
    HeaderEntry,
    encode_header,
    entry_name,
    entry_size_bound,
    parse_data_start,
    parse_header,
    split_by_header_limit,
)

SETTINGS = settings(max_examples=100, deadline=None)


def entries_of(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]],
) -> tuple[list[HeaderEntry], int]:
    entries, position = [], 0
    for name, dtype, shape in tensors:
        size = int(np.prod(shape)) * dtype.itemsize
        entries.append(HeaderEntry(name, code_of(dtype), shape, position, position + size))
        position += size
    return entries, position


def write(path: pathlib.Path, entries: list[HeaderEntry], size: int) -> bytes:
    header = encode_header(entries, {"format": "pt"})
    path.write_bytes(header + np.random.default_rng(0).bytes(size))
    return header


def test_safetensors_reads_every_dtype(tmp_path: pathlib.Path) -> None:
    every = sorted(DTYPES.values(), key=lambda entry: -entry.itemsize)
    entries, size = entries_of([(entry.name, entry.dtype, (2, 4)) for entry in every])
    path = tmp_path / "file.safetensors"
    header = write(path, entries, size)
    data = path.read_bytes()[len(header) :]
    loaded = load_torch(path)
    assert loaded.keys() == {entry.name for entry in every}
    for info, entry in zip(every, entries, strict=True):
        tensor = loaded[info.name]
        assert tensor.dtype is (info.dtype if info.safetensors else torch.uint8)
        expected = stored_shape(info, entry.shape)[1] if not info.safetensors else entry.shape
        assert tuple(tensor.shape) == expected
        stored = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert stored == data[entry.begin : entry.end]
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_safetensors_reads_with_numpy(tmp_path: pathlib.Path) -> None:
    entries, size = entries_of(
        [("a", torch.float64, (3,)), ("b@0,2", torch.int32, ()), ("größe", torch.uint8, (0, 2))]
    )
    write(tmp_path / "file.safetensors", entries, size)
    loaded = load_numpy(tmp_path / "file.safetensors")
    assert {name: array.shape for name, array in loaded.items()} == {
        "a": (3,), "b@0,2": (), "größe": (0, 2),
    }  # fmt: skip


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from([entry.dtype for entry in DTYPES.values()])


@SETTINGS
@given(st.lists(st.tuples(names, dtypes, shapes), max_size=8), st.booleans())
def test_headers_round_trip(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: bool
) -> None:
    taken: set[str] = set()
    named = []
    for fqn, dtype, shape in tensors:
        name = entry_name(fqn, None, taken)
        assert name not in taken
        taken.add(name)
        named.append((name, dtype, shape))
    entries, size = entries_of(named)
    extra = {"a": "ö"} if metadata else {}
    header = encode_header(entries, extra)
    assert len(header) % DATA_ALIGNMENT == 0
    assert parse_data_start(header[:8], len(header) + size) == len(header)
    parsed = parse_header(header + b"data", len(header) + size)
    assert parsed.data_start == len(header)
    assert parsed.metadata == extra
    assert [(n, e.begin, e.end) for n, e in parsed.entries.items()] == [
        (e.name, e.begin, e.end) for e in entries
    ]
    for entry in entries:
        expected = stored_shape(DTYPES[entry.dtype_code], entry.shape)
        found = parsed.entries[entry.name]
        assert (found.dtype, found.shape) == expected


def test_entry_names() -> None:
    taken: set[str] = set()
    for expected, (fqn, offsets) in {
        "w": ("w", None),
        "w@0,8": ("w", (0, 8)),
        "w@@1": ("w", None),
        "w@@2": ("w", None),
        "w@0,8@@1": ("w@0,8", None),
        "__metadata__@@1": ("__metadata__", None),
        "__metadata__@@2": ("__metadata__", None),
        "": ("", None),
    }.items():
        name = entry_name(fqn, offsets, taken)
        assert name == expected
        taken.add(name)


def test_names_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(UnsupportedStateError, match="UTF-8"):
        encode_header([HeaderEntry("a\ud800", code_of(torch.uint8), (1,), 0, 1)], {})


@SETTINGS
@given(names, st.lists(st.integers(0, 1 << 60), max_size=5), dtypes)
def test_the_bound_holds(fqn: str, sizes: list[int], dtype: torch.dtype) -> None:
    name = entry_name(fqn, sizes, {f"{fqn}@{','.join(map(str, sizes))}"})
    entry = HeaderEntry(name, code_of(dtype), tuple(sizes), 1 << 60, 1 << 61)
    alone = encode_header([entry], {})
    assert len(alone.rstrip()) - 10 < entry_size_bound(fqn, len(sizes))


def test_files_are_split_by_header_size() -> None:
    bounds = np.full(100, 1000, np.int64)
    limit = 2 * DATA_ALIGNMENT + 10_500
    numbers = split_by_header_limit(bounds, limit)
    assert numbers.tolist() == [i // 10 for i in range(100)]
    assert split_by_header_limit(bounds).max() == 0
    assert split_by_header_limit(np.array([], np.int64)).tolist() == []
    # An entry over the limit by itself still gets a file.
    assert split_by_header_limit(np.array([9, 10**9, 9])).tolist() == [0, 1, 2]


def raw(header: object, data: int = 0) -> tuple[bytes, int]:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body, 8 + len(body) + data


def entry(begin: int, end: int, **fields: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **fields}


BAD = {
    "short": (b"1234567", 7),
    "length past end": (struct.pack("<Q", 100) + b"{}", 10),
    "absurd length": (b"\xff" * 8 + b"{}", 1 << 62),
    "no json": raw(b"{]"),
    "no object": raw([1]),
    "not utf-8": raw(b'{"\xff":1}'),
    "deep": raw(b"[" * 200_000 + b"]" * 200_000),
    "huge integer": raw(b'{"a":' + b"9" * 5000 + b"}"),
    "key twice": raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 2 + b'"b":1}'),
    "inner key twice": raw(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "no entry": raw({"a": 1}),
    "field missing": raw({"a": {"dtype": "U8", "shape": [0]}}),
    "field more": raw({"a": entry(0, 1, more=1)}, 1),
    "float": raw({"a": entry(0, 1, shape=[1.0])}, 1),
    "bool": raw({"a": entry(0, 1, shape=[True])}, 1),
    "negative": raw({"a": entry(0, 1, shape=[-1])}, 1),
    "three offsets": raw({"a": entry(0, 1, data_offsets=[0, 1, 2])}, 1),
    "backwards": raw({"a": entry(0, 0, data_offsets=[1, 0])}),
    "size differs": raw({"a": entry(0, 4, shape=[3])}, 4),
    "unknown dtype": raw({"a": entry(0, 4, dtype="F7")}, 4),
    "dtype no string": raw({"a": entry(0, 4, dtype=[])}, 4),
    "out of file": raw({"a": entry(0, 4)}, 3),
    "rest of file": raw({"a": entry(0, 4)}, 5),
    "gap": raw({"a": entry(0, 4), "b": entry(5, 6)}, 6),
    "overlap": raw({"a": entry(0, 4), "b": entry(3, 6)}, 6),
    "metadata": raw({"__metadata__": {"a": 1}}),
    "metadata list": raw({"__metadata__": []}),
}


@pytest.mark.parametrize(("prefix", "size"), BAD.values(), ids=BAD.keys())
def test_invalid_headers_are_refused(prefix: bytes, size: int) -> None:
    with pytest.raises(DamagedCheckpointError) as caught:
        parse_header(prefix, size)
    assert caught.value.kind == "header_mismatch"


def test_a_header_that_was_not_read_whole_is_refused() -> None:
    with pytest.raises(DamagedCheckpointError, match="were read"):
        parse_header(encode_header([], {})[:100], DATA_ALIGNMENT)


@SETTINGS
@given(st.data())
def test_mutations_give_headers_or_errors(data: st.DataObject) -> None:
    entries, size = entries_of([("a", torch.float32, (3,)), ("b", torch.uint8, (2, 2))])
    header = bytearray(encode_header(entries, {"k": "v"}))
    interesting = len(bytes(header).rstrip())
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, interesting - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_header(bytes(header), len(header) + size)
    except CheckpointError as error:
        assert error.kind == "header_mismatch"
