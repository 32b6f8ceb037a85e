"""A checkpoint that is not there, not whole or not what was written: refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from tests.end_to_end.checkpoints import (
    EXTRA,
    Refusal,
    data_of,
    empty,
    forge,
    load,
    refused,
    save,
    snapshot,
    state,
    value_at,
    write_manifest,
)

MANIFEST = "manifest.json"
DATA = "rank00000-00.safetensors"
DIGESTS = "rank00000.digests"
Damage = Callable[[Path], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "step-1"
    save(place, state(), extra_files=EXTRA)
    return place


def test_no_checkpoint(tmp_path: Path) -> None:
    text = refused(
        lambda: load(tmp_path / "no", empty()),
        Refusal(error=dcp.NotFoundError, kind="not_found"),
        tmp_path / "no",
    )
    assert "manifest.json" in text
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_and_one_of_something_else(tmp_path: Path) -> None:
    expected = Refusal(error=dcp.NotFoundError, kind="not_found")
    refused(lambda: load(tmp_path, empty()), expected, tmp_path)
    (tmp_path / "data-short").mkdir()
    (tmp_path / ".metadata").write_bytes(b"pickle of torch's DCP")
    refused(lambda: load(tmp_path, empty()), expected, tmp_path)


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("mine")
    expected = Refusal(error=dcp.StorageError, kind="io_error", file=MANIFEST)
    for path in (place, place / "below"):
        refused(lambda path=path: load(path, empty()), expected, path)  # type: ignore[misc]
        refused(lambda path=path: save(path, state()), expected, path)  # type: ignore[misc]
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_data_without_a_manifest_is_not_committed(root: Path) -> None:
    (root / MANIFEST).unlink()
    before = snapshot(root)
    text = refused(
        lambda: load(root, empty()),
        Refusal(error=dcp.NotFoundError, kind="not_committed"),
        root,
    )
    assert "earlier checkpoint" in text
    assert snapshot(root) == before


def cut(name: str, to: float) -> Damage:
    """Keep the fraction ``to`` of a file of the data directory, or of the manifest."""

    def damage(root: Path) -> None:
        path = root / name if name == MANIFEST else data_of(root) / name
        os.truncate(path, int(path.stat().st_size * to))

    return damage


def append(name: str) -> Damage:
    def damage(root: Path) -> None:
        path = root / name if name == MANIFEST else data_of(root) / name
        path.write_bytes(path.read_bytes() + b"x")

    return damage


def remove(name: str) -> Damage:
    return lambda root: (data_of(root) / name).unlink()


def overwrite(content: bytes) -> Damage:
    return lambda root: (root / MANIFEST).write_bytes(content)


def flip(name: str, position: int) -> Damage:
    def damage(root: Path) -> None:
        path = root / name if name == MANIFEST else data_of(root) / name
        data = bytearray(path.read_bytes())
        data[position] ^= 0x10
        path.write_bytes(data)

    return damage


def field(name: str, value: object) -> Damage:
    """A forged manifest: one field has another value."""
    return lambda root: forge(root, lambda fields: fields.__setitem__(name, value))


def inside(section: str, name: str, value: object) -> Damage:
    return lambda root: forge(root, lambda fields: fields[section].__setitem__(name, value))


def without(name: str) -> Damage:
    return lambda root: forge(root, lambda fields: fields.pop(name))


def twice(name: str) -> Damage:
    """The manifest has field ``name`` two times."""

    def damage(root: Path) -> None:
        fields = json.loads((root / MANIFEST).read_bytes())
        del fields["manifest_xxh3_128"]
        text = json.dumps(fields, separators=(",", ":"))
        again = json.dumps({name: fields[name]}, separators=(",", ":"))
        write_manifest(root / MANIFEST, f"{text[:-1]},{again[1:]}")

    return damage


def damaged(kind: str, file: str | None = MANIFEST, tensor: str | None = None) -> Refusal:
    return Refusal(error=dcp.DamagedCheckpointError, kind=kind, file=file, tensor=tensor)


def in_data(kind: str, name: str = DATA, tensor: str | None = None) -> Refusal:
    return damaged(kind, f"data-*/{name}", tensor)


MANIFESTS: dict[str, tuple[Damage, Refusal]] = {
    "empty": (cut(MANIFEST, 0), damaged("manifest_truncated")),
    "its first byte alone": (overwrite(b"{"), damaged("manifest_truncated")),
    "a tenth": (cut(MANIFEST, 0.1), damaged("manifest_truncated")),
    "half": (cut(MANIFEST, 0.5), damaged("manifest_truncated")),
    "all but the last bytes": (cut(MANIFEST, 0.999), damaged("manifest_truncated")),
    "longer": (append(MANIFEST), damaged("manifest_truncated")),
    "not JSON": (overwrite(b"PK\x03\x04 not json\n"), damaged("manifest_invalid")),
    "zeros": (overwrite(b"\0" * 4096), damaged("manifest_invalid")),
    "JSON of something else": (overwrite(b'{"weight_map":{}}\n'), damaged("manifest_invalid")),
    "a list": (overwrite(b"[]\n"), damaged("manifest_invalid")),
    "deep nesting": (overwrite(b"[" * 100_000 + b"]" * 100_000), damaged("manifest_invalid")),
    "a flipped bit": (flip(MANIFEST, 300), damaged("digest_mismatch")),
    "a world size that is text": (field("world_size", "1"), damaged("manifest_invalid")),
    "a world size of 0": (field("world_size", 0), damaged("manifest_invalid")),
    "a world size without end": (field("world_size", 10**30), damaged("manifest_invalid")),
    "a save id that is a path": (field("save_id", "../../etc"), damaged("manifest_invalid")),
    "tensors that are a list": (field("tensors", []), damaged("manifest_invalid")),
    "a dtype nobody has": (
        inside("tensors", "dtypes", ["float33"] * 6),
        damaged("manifest_invalid"),
    ),
    "a time that is text": (field("time", "now"), damaged("manifest_invalid")),
    "a missing field": (without("digest_files"), damaged("manifest_invalid")),
    "a field twice": (twice("world_size"), damaged("manifest_invalid")),
    "a tensor twice": (
        lambda root: forge(root, double_name),
        damaged("manifest_invalid", tensor="large"),
    ),
    "an object twice": (
        lambda root: forge(root, lambda f: f["objects"].append(f["objects"][0])),
        damaged("manifest_invalid", tensor="step"),
    ),
    "an extra file twice": (
        inside("extra_files", "name", ["extra/a", "extra/a"]),
        damaged("manifest_invalid"),
    ),
    "an extra file above the checkpoint": (
        inside("extra_files", "name", ["extra/../../../secret", "extra/a"]),
        damaged("unsafe_path"),
    ),
    "an absolute extra file": (
        inside("extra_files", "name", ["/etc/passwd", "extra/a"]),
        damaged("unsafe_path"),
    ),
    "a file of another rank": (inside("data_files", "rank", 1), damaged("manifest_invalid")),
    "a negative size": (inside("data_files", "size", [-1]), damaged("manifest_invalid")),
    "a chunk behind its file's end": (
        lambda root: forge(root, lambda f: move_chunk(f, 10**9)),
        damaged("chunk_out_of_bounds", tensor="large"),
    ),
    "a chunk before its file's begin": (
        lambda root: forge(root, lambda f: move_chunk(f, -8)),
        damaged("manifest_invalid"),
    ),
    "two tensors in one place": (
        lambda root: forge(root, lambda f: move_chunk(f, 40)),
        damaged("chunks_overlap", tensor="large"),
    ),
    "an object behind the end": (
        lambda root: forge(root, lambda f: move_blob(f, 10**9)),
        damaged("chunk_out_of_bounds", tensor="blob"),
    ),
}


def double_name(fields: dict[str, Any]) -> None:
    names = fields["tensors"]["names"]
    names[names.index("model.half")] = "large"


def move_chunk(fields: dict[str, Any], start: int) -> None:
    """Put "large" elsewhere in its file."""
    table = fields["tensors"]
    stored = [n for n, a in zip(table["names"], table["aliases"], strict=True) if a == 0]
    table["start"][stored.index("large")] = start


def move_blob(fields: dict[str, Any], start: int = 0) -> None:
    for entry in fields["objects"]:
        if entry[0] == "blob":
            entry[5] = start


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is(root: Path, name: str) -> None:
    damage, expected = MANIFESTS[name]
    assert value_at(root) == 1.0
    damage(root)
    before = snapshot(root.parent)
    refused(lambda: load(root, empty()), expected, root)
    assert snapshot(root.parent) == before


@pytest.mark.parametrize(("version", "accepted"), [("2.0", False), ("1.7", True), ("0.9", False)])
def test_another_version(root: Path, version: str, accepted: bool) -> None:
    field("version", version)(root)
    if accepted:
        assert value_at(root) == 1.0
        return
    text = refused(
        lambda: load(root, empty()),
        Refusal(error=dcp.UnsupportedVersionError, kind="unsupported_version", file=MANIFEST),
        root,
    )
    assert f"install a dcp_engine that reads format {version[0]}" in text.replace(
        "Install", "install"
    )


FILES: dict[str, tuple[Damage, Refusal]] = {
    "missing": (remove(DATA), in_data("file_missing")),
    "empty": (cut(DATA, 0), in_data("file_short")),
    "half": (cut(DATA, 0.5), in_data("file_short")),
    "longer": (append(DATA), in_data("file_short")),
    "its header flipped": (flip(DATA, 20), in_data("header_mismatch")),
    "its header's length flipped": (flip(DATA, 2), in_data("header_mismatch")),
    "its header's padding flipped": (flip(DATA, 4095), in_data("header_mismatch")),
    "a tensor flipped": (flip(DATA, 4096), in_data("digest_mismatch", DATA, "large")),
    "another tensor flipped": (
        flip(DATA, 4096 + 160_000),
        in_data("digest_mismatch", DATA, "model.weight"),
    ),
    "an object flipped": (flip(DATA, -1), in_data("digest_mismatch", DATA, "blob")),
    "digests missing": (remove(DIGESTS), in_data("file_missing", DIGESTS)),
    "digests empty": (cut(DIGESTS, 0), in_data("file_short", DIGESTS)),
    "digests short": (cut(DIGESTS, 0.9), in_data("file_short", DIGESTS)),
    "digests flipped": (flip(DIGESTS, 77), in_data("digest_mismatch", DIGESTS)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is(root: Path, name: str) -> None:
    damage, expected = FILES[name]
    damage(root)
    before = snapshot(root)
    refused(lambda: load(root, empty()), located(expected, root), root)
    assert snapshot(root) == before


def test_an_object_in_a_tensor_s_place(root: Path) -> None:
    forge(root, move_blob)
    refused(
        lambda: load(root, empty()), located(in_data("header_mismatch", DATA, "blob"), root), root
    )


def located(expected: Refusal, root: Path) -> Refusal:
    """``expected`` with the name of the data directory."""
    file = (expected.file or "").replace("data-*", data_of(root).name)
    return Refusal(error=expected.error, kind=expected.kind, file=file, tensor=expected.tensor)


EXTRAS: dict[str, tuple[Damage, str]] = {
    "missing": (remove("extra/notes/a"), "file_missing"),
    "short": (cut("extra/notes/a", 0.5), "file_short"),
    "longer": (append("extra/notes/a"), "file_short"),
    "flipped": (flip("extra/notes/a", 3), "digest_mismatch"),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_file_that_is(root: Path, name: str, read_extra: Any) -> None:
    damage, kind = EXTRAS[name]
    assert read_extra(root, "notes/a") == b"some notes"
    damage(root)
    with pytest.raises(dcp.DamagedCheckpointError) as caught:
        read_extra(root, "notes/a")
    error = caught.value
    assert (error.kind, error.checkpoint) == (kind, str(root))
    assert error.file == f"{data_of(root).name}/extra/notes/a"
    assert error.hint and str(root) in str(error)
    assert read_extra(root, "config.json") == b"{}"
    assert value_at(root) == 1.0  # the state needs no extra file


def test_extra_files_that_are_not_there(root: Path, tmp_path: Path, read_extra: Any) -> None:
    for place, name in ((root, "other"), (tmp_path / "no", "config.json")):
        with pytest.raises(dcp.NotFoundError) as caught:
            read_extra(place, name)
        assert caught.value.kind == "not_found"
        assert caught.value.checkpoint == str(place)
        assert caught.value.hint
    for name in ("../manifest.json", "/etc/passwd", "a/../../x", ""):
        with pytest.raises(dcp.UsageError) as refusal:
            read_extra(root, name)
        assert refusal.value.checkpoint == str(root)


@pytest.mark.parametrize("name", [DATA, DIGESTS, ""])
def test_a_symbolic_link_in_a_file_s_place(root: Path, tmp_path: Path, name: str) -> None:
    """Also for the data directory itself: nothing outside is ever read."""
    path = data_of(root) / name
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(dcp.CheckpointException) as caught:
        load(root, empty())
    cause = caught.value.failures[0][0]
    assert isinstance(cause, dcp.DamagedCheckpointError)
    assert (cause.kind, cause.checkpoint) == ("unsafe_path", str(root))
    assert cause.file is not None and cause.file.startswith("data-")
    assert cause.hint


def test_a_manifest_that_is_a_link(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (root / MANIFEST).rename(outside)
    (root / MANIFEST).symlink_to(outside)
    refused(lambda: load(root, empty()), damaged("unsafe_path"), root)


def test_a_directory_in_the_manifest_s_place(root: Path) -> None:
    (root / MANIFEST).unlink()
    (root / MANIFEST).mkdir()
    before = snapshot(root)
    refused(lambda: load(root, empty()), damaged("unsafe_path"), root)
    with pytest.raises(dcp.CheckpointException) as caught:
        save(root, state(2.0))
    assert isinstance(caught.value.failures[0][0], dcp.CheckpointError)
    assert caught.value.failures[0][0].file == MANIFEST
    assert snapshot(root) == before


def test_the_data_file_of_another_checkpoint(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "step-2"
    save(other, state(2.0), extra_files=EXTRA)
    sizes = [(data_of(place) / DATA).stat().st_size for place in (root, other)]
    assert sizes[0] == sizes[1]
    shutil.copy(data_of(other) / DATA, data_of(root) / DATA)
    refused(lambda: load(root, empty()), located(in_data("header_mismatch"), root), root)
    # With its digests, which the manifest does not know.
    shutil.copy(data_of(other) / DIGESTS, data_of(root) / DIGESTS)
    refused(lambda: load(root, empty()), located(in_data("digest_mismatch", DIGESTS), root), root)


def test_without_digests_files_and_headers_are_still_checked(root: Path) -> None:
    """``verify_digests=False`` drops the check of numbers, no other."""
    flip(DATA, 4096 + 160_000)(root)
    reader = dcp.FileSystemReader(root, verify_digests=False)
    loaded = empty()
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert not torch.equal(loaded["model"]["weight"], state()["model"]["weight"])
    cut(DATA, 0.5)(root)
    refused(
        lambda: dcp.load(empty(), storage_reader=reader, no_dist=True),
        located(in_data("file_short"), root),
        root,
    )


def test_a_failed_read_says_that_the_destination_may_be_partly_filled(root: Path) -> None:
    flip(DATA, -1)(root)
    with pytest.raises(dcp.CheckpointException) as caught:
        load(root, empty())
    assert "partly filled" in str(caught.value)


@pytest.mark.parametrize("name", ["shape", "missing"])
def test_a_refused_destination_was_not_touched(root: Path, name: str) -> None:
    """What does not fit is found before a byte has moved."""
    into = empty()
    if name == "shape":
        into["large"] = torch.full((7,), -1.0)
    else:
        into["other"] = torch.zeros(1)
    with pytest.raises(dcp.CheckpointException) as caught:
        load(root, into)
    assert "partly filled" not in str(caught.value)
    assert bool((into["model"]["weight"] == -1).all())
    assert into["step"] is None
