"""The golden files: written today, byte for byte; read today, value for value."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from dcp_engine.errors import DamagedCheckpointError
from dcp_engine.format.digest import block_digests, decode_digests, digest_value, xxh3_128_hex
from dcp_engine.format.dtypes import DTYPES
from dcp_engine.format.manifest import Manifest, decode_manifest
from dcp_engine.format.names import decode_owner, parse_data_directory
from dcp_engine.format.object_codec import decode_object
from dcp_engine.format.shard_file import parse_header
from tests.format.test_object_codec import same
from tests.golden.regenerate import SAVE_ID, VALUES, build, tensors

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "v1"
CHECKPOINT = GOLDEN / "checkpoint"


def read_manifest() -> Manifest:
    return decode_manifest((CHECKPOINT / "manifest.json").read_bytes(), checkpoint=CHECKPOINT)


def test_golden_files_are_what_is_written_today() -> None:
    """If this fails, the format has changed: see tests/golden/regenerate.py."""
    made = build()
    stored = {str(p.relative_to(GOLDEN)): p for p in GOLDEN.rglob("*") if p.is_file()}
    assert made.keys() == stored.keys()
    if len(DTYPES) < 41:  # an older torch cannot make these two
        made = {name: data for name, data in made.items() if "dtypes" not in name}
    for name, data in made.items():
        assert stored[name].read_bytes() == data, name


def test_the_golden_checkpoint_reads_as_it_was() -> None:
    manifest = read_manifest()
    manifest.validate()
    directory = CHECKPOINT / manifest.data_directory
    assert parse_data_directory(directory.name) == SAVE_ID
    assert decode_owner((directory / "owner.json").read_bytes()).run_id == "golden"
    raw = [(directory / f.name).read_bytes() for f in manifest.data_files]
    expected = tensors()
    seen = 0
    for tensor in manifest.all_tensors():
        name = tensor.name if tensor.owner < 0 else f"{tensor.name}/{tensor.owner}"
        whole = expected[tensor.alias_of or name]
        assert (tensor.dtype, tensor.shape) == (whole.dtype, tuple(whole.shape))
        chunks = tensor.chunks
        columns = (chunks.offsets, chunks.sizes, chunks.file, chunks.start, chunks.nbytes)
        for offsets, sizes, file, start, nbytes in zip(*(c.tolist() for c in columns), strict=True):
            begin = manifest.data_files[file].data_start + start
            data = bytearray(raw[file][begin : begin + nbytes])
            box = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            assert torch.equal(torch.frombuffer(data, dtype=whole.dtype).reshape(sizes), box)
            seen += 1
    assert seen == 9
    big = manifest.objects["big"]
    begin = manifest.data_files[big.file].data_start + big.start
    data_of_big = raw[big.file][begin : begin + big.nbytes]
    assert decode_object(data_of_big, big.pickled, fqn="big") == list(range(100))
    for rank, seed in manifest.per_rank_objects["seed"].items():
        assert seed.inline is not None
        assert decode_object(seed.inline, seed.pickled, fqn="seed") == rank
    for extra in manifest.extra_files:
        content = (directory / extra.name).read_bytes()
        assert (len(content), xxh3_128_hex(content)) == (extra.size, extra.xxh3_128)


def test_headers_digests_and_manifest_agree() -> None:
    manifest = read_manifest()
    directory = CHECKPOINT / manifest.data_directory
    for row, file in enumerate(manifest.data_files):
        data = (directory / file.name).read_bytes()
        assert len(data) == file.size
        header = parse_header(data, file.size)
        assert header.data_start == file.data_start
        listed = manifest.digest_file(file.rank)
        digests = (directory / listed.name).read_bytes()
        assert (len(digests), xxh3_128_hex(digests)) == (listed.size, listed.xxh3_128)
        table = decode_digests(digests)
        assert table.block_size == manifest.block_size
        assert table.header_digest(file.number) == digest_value(data[: file.data_start])
        stored = {
            (int(start), int(nbytes))
            for tensor in manifest.all_tensors()
            for of, start, nbytes in zip(
                tensor.chunks.file, tensor.chunks.start, tensor.chunks.nbytes, strict=True
            )
            if of == row
        } | {(o.start, o.nbytes) for o in manifest.all_objects() if o.file == row}
        assert stored == {(e.begin, e.end - e.begin) for e in header.entries.values()}
        for start, nbytes in stored:
            chunk = data[file.data_start + start :][:nbytes]
            found, blocks = table.lookup(file.number, start)
            assert found == nbytes
            assert (blocks == block_digests(chunk, manifest.block_size)).all()


def test_safetensors_reads_the_golden_data() -> None:
    directory = CHECKPOINT / f"data-{SAVE_ID}"
    first = load_file(directory / "rank00000-00.safetensors")
    second = load_file(directory / "rank00001-00.safetensors")
    expected = tensors()
    assert list(first) and first.keys() == {"phase", "model.weight@0,0", "model.bias", "rng"}
    rows = [first["model.weight@0,0"], second["model.weight@4,0"]]
    assert torch.equal(torch.cat(rows), expected["model.weight"])
    assert torch.equal(first["phase"].view(torch.complex128).reshape(2), expected["phase"])
    assert second["step"] == 1234


def test_the_golden_rank_manifest() -> None:
    manifest = decode_manifest((GOLDEN / "manifest-rank00001.json").read_bytes())
    assert (manifest.token, manifest.rank) == ("golden/0/1", 1)
    assert manifest.tensors["w"].chunks.offsets.tolist() == [[2, 0]]


def test_golden_objects_read_as_they_were() -> None:
    stored = json.loads((GOLDEN / "objects.json").read_bytes())
    assert stored.keys() == VALUES.keys()
    for name, value in VALUES.items():
        decoded = decode_object(bytes.fromhex(stored[name]), False, fqn=name)
        assert same(decoded, value), name


@pytest.mark.parametrize("name", ["manifest.json", f"data-{SAVE_ID}/rank00000.digests"])
def test_a_damaged_golden_file_is_seen(name: str) -> None:
    data = bytearray((CHECKPOINT / name).read_bytes())
    data[len(data) // 2] ^= 1
    if name.endswith(".json"):
        with pytest.raises(DamagedCheckpointError, match="digest differs"):
            decode_manifest(bytes(data))
    else:
        assert xxh3_128_hex(bytes(data)) != read_manifest().digest_file(0).xxh3_128
