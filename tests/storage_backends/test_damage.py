"""Every kind of damage is named: checkpoint, file and, where there is one, tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcp_engine.errors import CheckpointError, DamagedCheckpointError
from storage_backends.filesystem import FileSystemReader, FileSystemWriter
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.testing.faulty import Fault, FaultyByteStore, FlipBit
from tests.storage_backends.hand_plans import load, save, whole

A = "a" * 32
DATA = "rank00000-00.safetensors"
STATE = {
    "big": torch.arange(100_000, dtype=torch.float32),
    "small": torch.arange(5, dtype=torch.int16),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(
        [FileSystemWriter(tmp_path)],
        whole(STATE, blob=b"b" * 70_000, flag=True),
        A,
        extra_files={"notes": b"notes"},
    )
    return tmp_path


def inside(root: Path, name: str) -> Path:
    return root / f"data-{A}" / name


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def read_all(root: Path) -> None:
    destinations = {name: torch.zeros_like(t) for name, t in STATE.items()}
    load(FileSystemReader(root), [(n, (0,), t) for n, t in destinations.items()])
    opened = FileSystemReader(root)
    manifest, _ = opened.open_checkpoint(None)
    try:
        opened.read_object(manifest, manifest.objects["blob"])
        opened.read_extra(manifest, "notes")
    finally:
        opened.close_checkpoint()
    for name, tensor in destinations.items():
        assert torch.equal(tensor, STATE[name])


def data_start(root: Path) -> int:
    return 8 + int.from_bytes(inside(root, DATA).read_bytes()[:8], "little")


Damage = Callable[[Path], None]

CASES: dict[str, tuple[Damage, str, str | None, str | None]] = {
    "first bit of a tensor": (
        lambda root: flip(inside(root, DATA), data_start(root)),
        "digest_mismatch",
        DATA,
        "big",
    ),
    "last byte of a tensor": (
        lambda root: flip(inside(root, DATA), data_start(root) + 399_999),
        "digest_mismatch",
        DATA,
        "big",
    ),
    "a small tensor": (
        lambda root: flip(inside(root, DATA), data_start(root) + 400_000),
        "digest_mismatch",
        DATA,
        "small",
    ),
    "an object": (
        lambda root: flip(inside(root, DATA), inside(root, DATA).stat().st_size - 1),
        "digest_mismatch",
        DATA,
        "blob",
    ),
    "the header": (lambda root: flip(inside(root, DATA), 20), "header_mismatch", DATA, None),
    "the header's padding": (
        lambda root: flip(inside(root, DATA), data_start(root) - 1),
        "header_mismatch",
        DATA,
        None,
    ),
    "the header's length": (
        lambda root: flip(inside(root, DATA), 1),
        "header_mismatch",
        DATA,
        None,
    ),
    "a short data file": (
        lambda root: os.truncate(inside(root, DATA), inside(root, DATA).stat().st_size - 1),
        "file_short",
        DATA,
        None,
    ),
    "a long data file": (
        lambda root: os.truncate(inside(root, DATA), inside(root, DATA).stat().st_size + 1),
        "file_short",
        DATA,
        None,
    ),
    "an empty data file": (
        lambda root: os.truncate(inside(root, DATA), 0),
        "file_short",
        DATA,
        None,
    ),
    "no data file": (lambda root: inside(root, DATA).unlink(), "file_missing", DATA, None),
    "no digest file": (
        lambda root: inside(root, "rank00000.digests").unlink(),
        "file_missing",
        "rank00000.digests",
        None,
    ),
    "a flipped digest": (
        lambda root: flip(inside(root, "rank00000.digests"), 100),
        "digest_mismatch",
        "rank00000.digests",
        None,
    ),
    "a short digest file": (
        lambda root: os.truncate(inside(root, "rank00000.digests"), 50),
        "file_short",
        "rank00000.digests",
        None,
    ),
    "an extra file": (
        lambda root: flip(inside(root, "extra/notes"), 0),
        "digest_mismatch",
        "extra/notes",
        None,
    ),
    "no extra file": (
        lambda root: inside(root, "extra/notes").unlink(),
        "file_missing",
        "extra/notes",
        None,
    ),
    "the manifest": (lambda root: flip(root / "manifest.json", 200), "digest_mismatch", None, None),
    "half a manifest": (
        lambda root: os.truncate(root / "manifest.json", 300),
        "manifest_truncated",
        None,
        None,
    ),
    "an empty manifest": (
        lambda root: os.truncate(root / "manifest.json", 0),
        "manifest_truncated",
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damage_is_named(root: Path, name: str) -> None:
    damage, kind, file, tensor = CASES[name]
    read_all(root)
    damage(root)
    with pytest.raises(DamagedCheckpointError) as caught:
        read_all(root)
    error = caught.value
    assert (error.kind, error.tensor) == (kind, tensor)
    assert error.checkpoint == str(root)
    assert error.file == (f"data-{A}/{file}" if file else "manifest.json")


def test_a_foreign_file_of_the_same_size(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    state = {"big": STATE["big"] + 1, "smell": STATE["small"]}
    save([FileSystemWriter(other)], whole(state, blob=b"c" * 70_000, flag=True), A)
    shutil.copy(inside(other, DATA), inside(root, DATA))
    with pytest.raises(DamagedCheckpointError) as caught:
        read_all(root)
    assert caught.value.kind == "header_mismatch"


@pytest.mark.parametrize("name", [DATA, "rank00000.digests", "extra/notes"])
def test_a_symbolic_link_is_not_followed(root: Path, name: str) -> None:
    elsewhere = root / "elsewhere"
    inside(root, name).rename(elsewhere)
    inside(root, name).symlink_to(elsewhere)
    with pytest.raises(DamagedCheckpointError) as caught:
        read_all(root)
    assert caught.value.kind == "unsafe_path"
    assert caught.value.file == f"data-{A}/{name}"


def test_a_data_directory_that_is_a_link_is_not_followed(root: Path) -> None:
    (root / f"data-{A}").rename(root / "elsewhere")
    (root / f"data-{A}").symlink_to(root / "elsewhere")
    with pytest.raises(DamagedCheckpointError) as caught:
        read_all(root)
    assert caught.value.kind == "unsafe_path"


def test_partial_reads_see_damage_in_the_blocks_they_use(root: Path) -> None:
    flip(inside(root, DATA), data_start(root) + 65536 * 2)  # block 2 of "big"
    elements = 65536 // 4
    load(FileSystemReader(root), [("big", (0,), torch.zeros(2 * elements))])
    load(FileSystemReader(root), [("big", (3 * elements,), torch.zeros(10))])
    # The damaged byte itself is not asked for; its block is.
    with pytest.raises(DamagedCheckpointError) as caught:
        load(FileSystemReader(root), [("big", (3 * elements - 5,), torch.zeros(10))])
    assert caught.value.tensor == "big"
    base = data_start(root)
    assert f"bytes {base + 131072} to {base + 196607}" in caught.value.message


def test_without_digests_flipped_numbers_pass_but_files_are_checked(root: Path) -> None:
    flip(inside(root, DATA), data_start(root))
    destination = torch.zeros(100_000)
    load(FileSystemReader(root, verify_digests=False), [("big", (0,), destination)])
    assert not torch.equal(destination, STATE["big"])
    flip(inside(root, DATA), 20)
    with pytest.raises(DamagedCheckpointError):
        load(FileSystemReader(root, verify_digests=False), [("big", (0,), destination)])


def test_a_bit_flipped_on_the_way_is_seen(root: Path) -> None:
    for bit in (0, 7, 12345):
        fault = Fault(operation="read", name="*.safetensors", nth=2, action=FlipBit(bit))
        store = FaultyByteStore(FileSystemStore(root), [fault])
        reader = ShardedReader(lambda _, store=store: store, "x")  # type: ignore[misc]
        with pytest.raises(DamagedCheckpointError) as caught:
            load(reader, [("big", (0,), torch.zeros(100_000))])
        assert caught.value.kind == "digest_mismatch"
        assert store.fired


def test_every_flipped_byte_of_a_small_checkpoint_is_seen_or_without_effect(tmp_path: Path) -> None:
    state = {"w": torch.arange(6, dtype=torch.float32)}
    save([FileSystemWriter(tmp_path)], whole(state), A)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "owner.json"]
    assert len(files) == 3
    seen = 0
    for path in files:
        original = path.read_bytes()
        # A 4 KiB header is mostly padding.
        for position in range(0, len(original), 37 if len(original) > 4000 else 3):
            flip(path, position)
            destination = torch.zeros(6)
            try:
                load(FileSystemReader(tmp_path), [("w", (0,), destination)])
            except CheckpointError:
                seen += 1
            else:
                assert torch.equal(destination, state["w"]), (path.name, position)
            path.write_bytes(original)
    assert seen > 300
