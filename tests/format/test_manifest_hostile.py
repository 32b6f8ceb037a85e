"""Damaged and hostile manifests: a CheckpointError of the right kind, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.errors import (
    CheckpointError,
    DamagedCheckpointError,
    UnsupportedVersionError,
)
from dcp_engine.format.manifest import Manifest, decode_manifest
from tests.format.builders import Content, Row, body_of, edit, files, full_content, sign

SETTINGS = settings(max_examples=150, deadline=None)
GOOD = full_content().encode()
Fields = dict[str, Any]


def look_at_everything(manifest: Manifest) -> None:
    manifest.validate()
    manifest.nesting.paths()
    for tensor in manifest.all_tensors():
        _ = tensor.dtype, tensor.chunks


def kind_of(data: bytes) -> str:
    try:
        manifest = decode_manifest(data, checkpoint="step-1")
    except CheckpointError as error:
        assert error.checkpoint == "step-1"
        return error.kind
    with pytest.raises(CheckpointError) as caught:
        look_at_everything(manifest)
    assert caught.value.tensor is not None or "nesting" in str(caught.value)
    return caught.value.kind


def test_every_flipped_bit_is_seen() -> None:
    for position in range(len(GOOD)):
        damaged = bytearray(GOOD)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CheckpointError) as caught:
            decode_manifest(bytes(damaged))
        assert caught.value.kind in ("digest_mismatch", "manifest_truncated", "manifest_invalid")


def test_every_truncation_is_seen() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(DamagedCheckpointError) as caught:
            decode_manifest(GOOD[:length])
        assert caught.value.kind in ("manifest_truncated", "manifest_invalid")
    assert kind_of(GOOD[: len(GOOD) // 2]) == "manifest_truncated"


def test_appended_bytes_are_seen() -> None:
    assert kind_of(GOOD + b"\n") == "manifest_truncated"
    assert kind_of(GOOD + GOOD) == "digest_mismatch"


def test_a_newer_format_says_what_to_install() -> None:
    other = body_of(GOOD).replace(b'"version":"1.0"', b'"version":"2.0"')
    for data in (sign(other), other, other[:60]):
        with pytest.raises(UnsupportedVersionError, match=r"(?i)install") as caught:
            decode_manifest(data)
        assert "2.0" in str(caught.value)


def test_minor_versions_may_add_fields() -> None:
    def add(fields: Fields) -> None:
        fields["version"] = "1.7"
        fields["new"] = {"a": 1}
        fields["tensors"]["new"] = [1]
        fields["data_files"]["new"] = [1]
        fields["objects"][0] += [None, None, None, "new"]
        fields["objects"][0][4:7] = [0, 0, 0]
        fields["tensors"]["tables"][0].append([0, 0])
        fields["nesting"]["leaves"]["new"] = 1

    manifest = decode_manifest(edit(GOOD, add))
    assert manifest.version == "1.7"
    assert manifest.objects["lr"].inline == b"\x01N"


@pytest.mark.parametrize("data", [b"{}", b"null", b"\x80\x04.", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_no_manifests(data: bytes) -> None:
    assert kind_of(data) == "manifest_invalid"


@pytest.mark.parametrize("length", [0, 1, 10, 34])
def test_the_first_bytes_alone_are_a_truncated_manifest(length: int) -> None:
    assert kind_of(GOOD[:length]) == "manifest_truncated"


def put(*path: str | int, value: object) -> Callable[[Fields], None]:
    def change(fields: Any) -> None:
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    return change


def drop(*path: str) -> Callable[[Fields], None]:
    def change(fields: Any) -> None:
        for key in path[:-1]:
            fields = fields[key]
        del fields[path[-1]]

    return change


INVALID: dict[str, Callable[[Fields], None]] = {
    **{f"no {name}": drop(name) for name in (
        "save_id", "world_size", "time", "writers", "user_metadata", "block_size", "data_files",
        "digest_files", "extra_files", "tensors", "objects", "nesting",
    )},
    **{f"no tensors.{name}": drop("tensors", name) for name in (
        "names", "dtypes", "ndims", "shapes", "owners", "aliases", "file", "start", "table_rows",
        "tables",
    )},
    **{f"{name} is null": put(name, value=None) for name in (
        "save_id", "world_size", "time", "writers", "user_metadata", "data_files", "tensors",
    )},
    "save id": put("save_id", value="../" + "a" * 29),
    "save id upper case": put("save_id", value="A" * 32),
    "world size 0": put("world_size", value=0),
    "world size huge": put("world_size", value=1 << 70),
    "world size float": put("world_size", value=2.5),
    "time negative": put("time", value=-1),
    "block size": put("block_size", value=3),
    "writers": put("writers", value={"a": 1}),
    "token without rank": put("token", value="t"),
    "file of rank 5": put("data_files", "rank", value=5),
    "file twice": put("data_files", "rank", value=0),
    "file count": put("data_files", "rank", value=[0, 1, 0]),
    "file size": put("data_files", "size", value=[4096, -1]),
    "file size huge": put("data_files", "size", value=[4096, 1 << 80]),
    "file size string": put("data_files", "size", value="0:1"),
    "data start": put("data_files", "data_start", value=8),
    "data start behind end": put("data_files", "data_start", value=8192),
    "number negative": put("data_files", "number", value=-1),
    "digests twice": put("digest_files", "rank", value=0),
    "digests of no rank": put("digest_files", value={"rank": 0, "size": [], "xxh3_128": []}),
    "digest no hex": put("digest_files", "xxh3_128", value=["g" * 32, "0" * 32]),
    "digest count": put("digest_files", "xxh3_128", value=["0" * 32]),
    "extra twice": put("extra_files", value={
        "name": ["extra/a", "extra/a"], "size": [1, 1], "xxh3_128": ["0" * 32] * 2}),
    "extra size": put("extra_files", "size", value=[-1]),
    "name twice": put("tensors", "names", 1, value="model.weight"),
    "name shared and per rank": put("tensors", "names", 1, value="rng"),
    "name of object": put("tensors", "names", 1, value="lr"),
    "name of per-rank object": put("tensors", "names", 1, value="seed"),
    "per-rank name of object": put("objects", 0, 0, value="rng"),
    "name no string": put("tensors", "names", 1, value=5),
    "names count": put("tensors", "names", value=["a"]),
    "dtype": put("tensors", "dtypes", 0, value="float7"),
    "dtype count": put("tensors", "dtypes", value=["float32"]),
    "ndims 65": put("tensors", "ndims", value=65),
    "ndims count": put("tensors", "ndims", value=[1]),
    "shape negative": put("tensors", "shapes", 0, value=-4),
    "shape absurd": put("tensors", "shapes", 0, value=1 << 59),
    "shapes count": put("tensors", "shapes", value=[4]),
    "owner 3": put("tensors", "owners", value=3),
    "owner twice": put("tensors", "owners", value=[0, 0, 0, 0, 0, 1, 1]),
    "alias of alias": put("tensors", "aliases", value=[0, 0, 3, 0, 0, 0, 0]),
    "alias of other": put("tensors", "aliases", value=[0, 0, 2, 0, 0, 0, 0]),
    "alias of nothing": put("tensors", "aliases", value=[0, 0, 9, 0, 0, 0, 0]),
    "alias with table": put("tensors", "aliases", value=[2, 0, 1, 0, 0, 0, 0]),
    "table rows": put("tensors", "table_rows", value=[0]),
    "table rows order": put("tensors", "table_rows", value=[4, 0]),
    "table row": put("tensors", "table_rows", value=[0, 40]),
    "start count": put("tensors", "start", value=[0]),
    "start column": put("tensors", "start", value="0:1"),
    "file column": put("tensors", "file", value=7),
    "file progression": put("tensors", "file", value="0:1"),
    "file progression huge": put("tensors", "file", value="0:9999999999999999999"),
    "file not a column": put("tensors", "file", value="many"),
    "table empty": put("tensors", "tables", 0, value=[]),
    "table of strings": put("tensors", "tables", 0, value="x"),
    "table start no list": put("tensors", "tables", 0, value=[0, 0, 2, 6, 0, 0]),
    "table lengths": put("tensors", "tables", 0, value=[[0, 2, 0], 0, 2, 6, 0, [0, 48]]),
    "table file": put("tensors", "tables", 0, value=[[0, 2], 0, 2, 6, 9, [0, 48]]),
    "table start huge": put("tensors", "tables", 0, value=[[0, 2], 0, 2, 6, 0, [0, 1 << 62]]),
    "gap": put("tensors", "tables", 0, value=[[0, 2], 0, [2, 1], 6, 0, [0, 48]]),
    "no chunks": put("tensors", "tables", 0, value=[0, 0, 0, 0, 0, []]),
    "empty chunk": put("tensors", "tables", 0, value=[[0, 2, 4], 0, [2, 2, 0], 6, 0, [0, 48, 96]]),
    "object twice": put("objects", 1, 0, value="lr"),
    "object owner": put("objects", 0, 1, value=9),
    "object record short": put("objects", 0, value=["lr"]),
    "object inline": put("objects", 0, 3, value="not base64!"),
    "object pickled": put("objects", 0, 2, value=1),
    "object file": put("objects", 1, 4, value=2),
    "object nowhere": put("objects", 0, value=["lr", 0, False, None]),
    "nesting": put("nesting", value=[]),
}  # fmt: skip


@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID.keys())
def test_invalid_fields_are_refused(change: Callable[[Fields], None]) -> None:
    assert kind_of(edit(GOOD, change)) == "manifest_invalid"


BOUNDS: dict[str, Callable[[Fields], None]] = {
    "chunk behind file": put("tensors", "tables", 0, value=[[0, 2], 0, 2, 6, 0, [0, 60]]),
    "whole behind file": put("tensors", "start", value=[48, 1000, 60, 56]),
    "chunk outside tensor": put("tensors", "tables", 0, value=[[0, 3], 0, 2, 6, 0, [0, 48]]),
    "huge chunk": put("tensors", "tables", 0, value=[[0, 2], 0, 1 << 59, 6, 0, [0, 48]]),
    "object behind file": put("objects", 1, 6, value=33),
    "object of no bytes": put("objects", 1, 6, value=0),
    "object before file": put("objects", 1, 5, value=-1),
}


@pytest.mark.parametrize("change", BOUNDS.values(), ids=BOUNDS.keys())
def test_chunks_out_of_bounds_are_refused(change: Callable[[Fields], None]) -> None:
    assert kind_of(edit(GOOD, change)) == "chunk_out_of_bounds"


OVERLAPS: dict[str, Callable[[Fields], None]] = {
    "elements": put("tensors", "tables", 0, value=[[0, 1], 0, [2, 3], 6, [0, 1], [0, 0]]),
    "bytes of two tensors": put("tensors", "start", value=[47, 48, 60, 56]),
    "bytes of one tensor": put("tensors", "tables", 0, value=[[0, 2], 0, 2, 6, 0, [0, 0]]),
    "bytes of tensor and object": put("objects", 1, 5, value=67),
    "bytes of two ranks' values": put("tensors", "start", value=[48, 48, 60, 48]),
}


@pytest.mark.parametrize("change", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_overlaps_are_refused(change: Callable[[Fields], None]) -> None:
    assert kind_of(edit(GOOD, change)) == "chunks_overlap"


def test_an_overlap_among_other_tensors_does_not_stop_a_load() -> None:
    manifest = decode_manifest(edit(GOOD, OVERLAPS["bytes of tensor and object"]))
    manifest.validate(["model.weight", "lr"])
    with pytest.raises(DamagedCheckpointError, match="same bytes") as caught:
        manifest.validate(["rng", "big"])
    assert caught.value.file == "rank00000-00.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "extra/../../x", "extra/", "extra//x", "extra/a\\b", "extra/\x00", "..",
        "config.json", "extra/./a", "extra/" + "a" * 2000, "EXTRA/a", "manifest.json", "",
    ],
)  # fmt: skip
def test_unsafe_paths_are_refused(name: str) -> None:
    assert kind_of(edit(GOOD, put("extra_files", "name", value=[name]))) == "unsafe_path"


def test_names_of_data_files_cannot_be_given_at_all() -> None:
    changed = edit(GOOD, put("data_files", "name", value=["../../etc/passwd"] * 2))
    assert [f.name for f in decode_manifest(changed).data_files] == [
        "rank00000-00.safetensors", "rank00001-00.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"world_size":2', b'"world_size":2,"world_size":2'),
        (b'"data_files":{', b'"data_files":{"rank":0,'),
        (b'"tensors":{', b'"tensors":{"file":0,'),
        (b'"user_metadata":{', b'"user_metadata":{"run":1,'),
        (b'{"a":[]}', b'{"a":[],"a":[]}'),
        (b'"writers":{', b'"writers":{"torch":"1",'),
        (b'"nesting":{', b'"nesting":{"leaves":{},'),
        (b'"leaves":{', b'"leaves":{"keys":[],'),
        (b'"world_size":2', b'"world_siz\\u0065":2,"world_size":2'),
        (b'"world_size":2', b'"world_size": 2'),
    ],
)
def test_keys_that_are_there_twice_are_refused(old: bytes, new: bytes) -> None:
    body = body_of(GOOD)
    assert body.count(old) == 1
    assert kind_of(sign(body.replace(old, new))) == "manifest_invalid"


@pytest.mark.parametrize("field", ["user_metadata", "writers", "tensors", "nesting", "new"])
def test_deep_nesting_is_refused_or_ignored(field: str) -> None:
    deep = b'"%b":' % field.encode() + b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    body = body_of(edit(GOOD, drop(field))) if field != "new" else body_of(GOOD)
    assert kind_of(sign(body + b"," + deep)) == "manifest_invalid"


def test_a_few_bytes_cannot_claim_many_chunks() -> None:
    # Constant columns cost nothing; the list of starts is what there must be as much of.
    rows = [Row(name="w", shape=(1 << 30,), chunks=[((i,), (1,), 0, i) for i in range(8)])]
    data = Content(rows=rows, data_files=files(100)).encode()
    assert kind_of(edit(data, put("tensors", "tables", 0, value=["0:1", 1, 0, "0:4"]))) == (
        "manifest_invalid"
    )


def test_numbers_that_json_should_not_have() -> None:
    for value in (b"NaN", b"Infinity", b"1e999", b"9" * 5000):
        body = body_of(GOOD).replace(b'"time":1763683200.5', b'"time":' + value)
        assert kind_of(sign(body)) == "manifest_invalid"


def test_text_that_is_not_utf8() -> None:
    body = body_of(GOOD).replace(b'"model.bias"', b'"model.\xffias"')
    assert kind_of(sign(body)) == "manifest_invalid"


@SETTINGS
@given(st.data())
def test_mutations_give_manifests_or_errors(data: st.DataObject) -> None:
    """Mutations that are signed again, so that they get past the digest."""
    body = bytearray(body_of(GOOD))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(body) - 1))
        piece = data.draw(
            st.binary(min_size=1, max_size=2)
            | st.sampled_from([b"-", b"9", b"[", b"]", b"{", b"}", b'"', b",", b":", b"null"])
        )
        body[position : position + len(piece)] = piece
    try:
        look_at_everything(decode_manifest(sign(bytes(body))))
    except CheckpointError as error:
        assert error.kind
