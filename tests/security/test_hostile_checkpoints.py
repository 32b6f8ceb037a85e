"""Whatever a checkpoint was made to do to its reader, it is refused, and nothing else happens.

Each test is one kind of malformed or malicious checkpoint whose digests are right. Where a kind is
tested elsewhere already, the other place is named here:

==============================================  ==================================================
pickles without ``allow_pickle``                here; the codec: format/test_object_codec
paths outside the data directory                format/test_manifest_hostile (unsafe paths),
                                                end_to_end/test_bad_checkpoint,
                                                storage_backends/test_filesystem_store (names)
links: data file, digests, directory, manifest  end_to_end/test_bad_checkpoint,
                                                storage_backends/test_filesystem_store
links: extra files, ranks' manifests, owner     here; prune: end_to_end/test_overwrite
absurd sizes in the manifest                    format/test_manifest_hostile
absurd sizes, asked for by a reader             here, and in bounded memory: test_memory
deep nesting: manifest                          format/test_manifest_hostile, format/test_nesting
deep nesting: headers, objects                  here and format/test_shard_file, test_object_codec
keys twice: manifest                            format/test_manifest_hostile
keys twice: headers                             here and format/test_shard_file
NaN, Infinity, numbers without end              format/test_manifest_hostile; headers: here
chunks that overlap or lie outside              format/test_manifest_hostile, format/test_tiling,
                                                end_to_end/test_bad_checkpoint
lies of a header, dtypes nobody knows           here and format/test_shard_file
``data_start`` and ``size`` that lie            here and format/test_manifest_hostile
another save's id                               here; other files: end_to_end/test_bad_checkpoint
numbers with equal hashes, packed archives      here
what inflates on the wire                       test_wire
URLs                                            test_urls
everything at random                            tests/fuzz
==============================================  ==================================================
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.format.object_codec import decode_object
from dcp_engine.format.tagged_types import varint
from tests.end_to_end.checkpoints import EXTRA, data_of, empty, forge, load, save, state
from tests.security.hostile import DATA, header_of, nothing_changes, put_header

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good") / "step-1"
    save(place, state(), extra_files=EXTRA)
    return place


@pytest.fixture
def root(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "step-1"))


def refusal_of(call: Callable[[], object]) -> dcp.CheckpointError:
    """What ``call`` is refused with, on this rank."""
    with pytest.raises(dcp.CheckpointError) as caught:
        call()
    error = caught.value
    if isinstance(error, dcp.CheckpointException):
        cause = error.failures[0][0]
        assert isinstance(cause, dcp.CheckpointError), str(error)
        return cause
    return error


def refused_load(root: Path) -> str:
    with nothing_changes(root.parent):
        return refusal_of(lambda: load(root, empty())).kind


# code --------------------------------------------------------------------------------------------


class Touch:
    """A pickle that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def put_object(root: Path, content: bytes, *, pickled: bool) -> None:
    """Store ``content`` as the object "step", in the manifest."""

    def change(fields: Fields) -> None:
        for record in fields["objects"]:
            if record[0] == "step":
                record[2:4] = [pickled, base64.b64encode(content).decode()]

    forge(root, change)


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name, content in records.items():
            target.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_not_executed(root: Path, tmp_path: Path, legacy: bool) -> None:
    made = tmp_path / "made"
    content = saved(Touch(made), _use_new_zipfile_serialization=not legacy)
    put_object(root, content, pickled=True)
    assert refused_load(root) == "pickle_refused"
    with dcp.open(root) as checkpoint:
        assert refusal_of(lambda: checkpoint["step"].load()).kind == "pickle_refused"
    assert not made.exists()


def test_a_pickle_that_says_it_is_none_is_not_executed(root: Path) -> None:
    put_object(root, saved(Touch(root.parent / "made")), pickled=False)
    assert refused_load(root) == "object_invalid"


def test_a_bare_pickle_is_not_executed(root: Path) -> None:
    content = b"cos\nmkdir\n(V" + str(root.parent / "made").encode() + b"\ntR."
    put_object(root, content, pickled=True)
    assert refused_load(root) in ("pickle_refused", "object_invalid")


@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning")
def test_an_archive_of_code_is_not_executed(root: Path) -> None:
    """A TorchScript archive, which ``torch.load`` would hand to ``torch.jit.load``."""
    records = {"a/constants.pkl": b"\x80\x02).", "a/data.pkl": b"\x80\x02}.", "a/version": b"3\n",
               "a/code/__torch__.py": b"def f(): return 1\n"}  # fmt: skip
    put_object(root, archive(records), pickled=True)
    assert refused_load(root) in ("object_invalid", "pickle_refused")


def test_a_tar_archive_is_not_unpacked(root: Path) -> None:
    """The oldest form of ``torch.save``, which is unpacked into a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as target:
        for name in ("pickle", "storages", "tensors", "../../escaped"):
            entry = tarfile.TarInfo(name)
            entry.size = 2
            target.addfile(entry, io.BytesIO(b"N."))
    put_object(root, buffer.getvalue(), pickled=True)
    assert refused_load(root) in ("object_invalid", "pickle_refused")
    assert not list(root.parent.parent.glob("*escaped*"))


def test_an_archive_that_unpacks_to_more_is_refused() -> None:
    """Compressed records: 64 MiB of zeros in 66 KB."""
    source = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(1 << 26, dtype=torch.uint8))))
    content = archive({n: source.read(n) for n in source.namelist()}, zipfile.ZIP_DEFLATED)
    assert len(content) < 100_000
    for allow_pickle in (False, True):
        error = refusal_of(
            lambda allow=allow_pickle: decode_object(  # type: ignore[misc]
                content, True, fqn="x", allow_pickle=allow
            )
        )
        assert error.kind == "object_invalid"
        assert "unpacks" in str(error)


def test_a_module_is_not_imported(root: Path) -> None:
    (root.parent / "evil.py").write_text("raise SystemExit")
    texts = [len(t).to_bytes(1, "little") + t for t in (b"evil", b"Colour", b"RED")]
    put_object(root, b"\x01E" + b"".join(texts), pickled=False)
    assert refused_load(root) == "import_refused"


@pytest.mark.parametrize("tag", [b"e", b"z", b"m", b"o"])
def test_numbers_that_collide_do_not_take_quadratic_time(tag: bytes) -> None:
    """Multiples of 2**61 - 1 have the hash 0; to put 100,000 of them into a set takes 40 s."""
    count = 100_000
    keys = (((1 << 61) - 1) * i for i in range(1, count + 1))
    tail = b"N" if tag in b"mo" else b""
    body = b"".join(b"i\x0b" + key.to_bytes(11, "little") + tail for key in keys)
    error = refusal_of(lambda: decode_object(b"\x01" + tag + varint(count) + body, False, fqn="x"))
    assert error.kind == "object_invalid" and "hash" in str(error)


@pytest.mark.parametrize("tag", [b"l", b"t", b"e", b"m"])
def test_objects_that_are_nested_without_end(root: Path, tag: bytes) -> None:
    put_object(root, b"\x01" + (tag + b"\x01") * 50_000 + b"N", pickled=False)
    assert refused_load(root) == "object_invalid"


# links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["extra/config.json", "extra/notes", "extra"])
def test_an_extra_file_behind_a_link(root: Path, name: str) -> None:
    """The content is right; where it lies is not."""
    inside, outside = data_of(root) / name, root.parent / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    wanted = "notes/a" if name == "extra/notes" else "config.json"
    with nothing_changes(root.parent):
        with dcp.open(root) as checkpoint:
            error = refusal_of(lambda: checkpoint.read_extra(wanted))
        assert error.kind == "unsafe_path"
        assert refusal_of(lambda: dcp.read_extra(root, wanted)).kind == "unsafe_path"


def test_a_rank_s_manifest_behind_a_link(tmp_path: Path) -> None:
    place, outside = tmp_path / "step-1", tmp_path / "outside"
    save(place, state(), use_collectives=False)
    (manifest,) = place.glob("manifest-rank*.json")
    manifest.rename(outside)
    manifest.symlink_to(outside)
    with nothing_changes(tmp_path):
        error = refusal_of(lambda: load(place, empty()))
    assert error.kind in ("unsafe_path", "not_committed")


def test_an_owner_record_behind_a_link_is_not_read_or_written(root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_text('{"run_id":"","restart_count":0,"group":"","host":"","boot_id":"","pid":0}')
    owner = data_of(root) / "owner.json"
    owner.unlink()
    owner.symlink_to(secret)
    before = secret.read_bytes()
    save(root, state(2.0))
    assert secret.read_bytes() == before
    loaded = empty()
    load(root, loaded)
    assert loaded["step"] == 2.0


def test_a_link_in_the_data_directory_is_removed_and_not_followed(root: Path) -> None:
    """What a save replaces is removed: the link, never what it points to."""
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "keep").write_text("mine")
    (data_of(root) / "extra" / "link").symlink_to(outside)
    save(root, state(2.0))
    assert (outside / "keep").read_text() == "mine"


# sizes -------------------------------------------------------------------------------------------


def grown(fields: Fields, size: int) -> None:
    """The data file, so the manifest says, is ``size`` bytes long, and all is one tensor."""
    fields["data_files"]["size"] = [size]


def test_an_object_of_absurd_size_takes_no_memory(root: Path) -> None:
    def change(fields: Fields) -> None:
        grown(fields, 1 << 60)
        for record in fields["objects"]:
            if record[0] == "blob":
                record[6] = 1 << 59

    forge(root, change)
    assert refused_load(root) == "file_short"
    with dcp.open(root) as checkpoint:
        assert refusal_of(lambda: checkpoint["blob"].load()).kind == "file_short"


def one_tensor(fields: Fields, elements: int) -> None:
    """ "large" has so many elements."""
    tensors = fields["tensors"]
    row = tensors["names"].index("large")
    ndims = tensors["ndims"]
    before = row * ndims if isinstance(ndims, int) else sum(ndims[:row])
    tensors["shapes"][before] = elements


@pytest.mark.parametrize(
    ("elements", "size", "kind"),
    [
        (1 << 50, None, "chunk_out_of_bounds"),
        (1 << 50, 1 << 60, "file_short"),
        (1 << 62, 1 << 60, "manifest_invalid"),
        (-1, None, "manifest_invalid"),
    ],
)
def test_a_tensor_of_absurd_size_takes_no_memory(
    root: Path, elements: int, size: int | None, kind: str
) -> None:
    def change(fields: Fields) -> None:
        one_tensor(fields, elements)
        if size is not None:
            grown(fields, size)

    forge(root, change)

    def read() -> None:
        with dcp.open(root) as checkpoint:
            tensor = checkpoint["large"]
            assert isinstance(tensor, dcp.LazyTensor)
            tensor[...]

    with nothing_changes(root.parent):
        assert refusal_of(read).kind == kind
        # Its place in a destination is of another size: that is refused, or what is wrong with it.
        assert refusal_of(lambda: load(root, empty())).kind in (kind, "shape_mismatch")


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("data_start", 0, "manifest_invalid"),
        ("data_start", -4096, "manifest_invalid"),
        ("data_start", 4097, "manifest_invalid"),
        ("data_start", 8192, "chunk_out_of_bounds"),
        ("data_start", 1 << 63, "manifest_invalid"),
        ("size", [1 << 60], "file_short"),
        ("size", [(1 << 60) + 1], "manifest_invalid"),
        ("size", [1 << 63], "manifest_invalid"),
        ("size", [-1], "manifest_invalid"),
        ("size", [8192], "chunk_out_of_bounds"),
    ],
)
def test_places_that_lie(root: Path, field: str, value: object, kind: str) -> None:
    forge(root, lambda fields: fields["data_files"].__setitem__(field, value))
    assert refused_load(root) == kind


@pytest.mark.parametrize("save_id", ["f" * 32, "F" * 32, "", "../../../../../../../../etc/xx"])
def test_another_save_s_id(root: Path, save_id: str) -> None:
    forge(root, lambda fields: fields.__setitem__("save_id", save_id))
    expected = "file_missing" if save_id == "f" * 32 else "manifest_invalid"
    assert refused_load(root) == expected


# headers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length", [0, 1, 4087, 4089, 8184, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
)
def test_a_header_that_lies_about_its_length(root: Path, length: int) -> None:
    put_header(root, json.dumps(header_of(root), separators=(",", ":")).encode(), length=length)
    assert refused_load(root) == "header_mismatch"


def entry(**changes: object) -> Callable[[Fields], object]:
    """Change the entry of "large"."""
    return lambda header: header["large"].update(changes)


HEADERS: dict[str, Callable[[Fields], object]] = {
    "dtype": entry(dtype="F33"),
    "dtype of another size": entry(dtype="F16"),
    "elements": entry(shape=[1 << 62]),
    "elements that wrap": entry(shape=[1 << 62, 4, 1 << 40]),
    "negative": entry(shape=[-40_000]),
    "offsets turned": entry(data_offsets=[160_000, 0]),
    "offset huge": entry(data_offsets=[0, 1 << 63]),
    "offset huger": entry(data_offsets=[0, 1 << 80]),
    "offset negative": entry(data_offsets=[-8, 160_000]),
    "overlap": entry(data_offsets=[40, 160_040]),
    "nan": entry(shape=[float("nan")]),
    "infinity": entry(data_offsets=[0, float("inf")]),
    "no dtype": lambda header: header["large"].pop("dtype"),
    "one more field": entry(path="/etc/passwd"),
    "metadata": lambda header: header.__setitem__("__metadata__", {"a": 1}),
    "no entry": lambda header: header.pop("large"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_wrong_and_signed(root: Path, name: str) -> None:
    header = header_of(root)
    HEADERS[name](header)
    put_header(root, json.dumps(header, separators=(",", ":")).encode())
    assert refused_load(root) == "header_mismatch"


HEADER_TEXTS: dict[str, bytes] = {
    "a key twice": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "nested lists": b"[" * 3000,
    "nested objects": b'{"a":' * 600 + b"1" + b"}" * 600,
    "digits": b'{"a":{"dtype":"U8","shape":[' + b"9" * 3900 + b'],"data_offsets":[0,0]}}',
    "no JSON": b"\x80\x04.",
    "no text": b'{"\xff":1}',
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADER_TEXTS)
def test_a_header_that_is_no_header_and_signed(root: Path, name: str) -> None:
    put_header(root, HEADER_TEXTS[name])
    assert refused_load(root) == "header_mismatch"


def test_the_same_header_signed_again_loads(root: Path) -> None:
    """The forger's tools are sound: what they sign is accepted."""
    put_header(root, json.dumps(header_of(root), separators=(",", ":")).encode())
    assert (data_of(root) / DATA).exists()
    loaded = empty()
    load(root, loaded)
    assert loaded["step"] == 1.0
