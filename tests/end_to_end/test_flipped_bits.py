"""Every byte of a small checkpoint, one at a time: a flipped bit is found by name, or it changes
nothing of what is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.format.names import OWNER_NAME
from tests.end_to_end.checkpoints import data_of, load, reader, save

STATE: dict[str, Any] = {
    "w": torch.arange(300, dtype=torch.float32).reshape(20, 15),
    "h": torch.arange(7, dtype=torch.int16),
    "blob": "b" * 5000,
    "step": 12,
}
BLOCK = 512
MANIFEST_STEP, HEADER_STEP, DATA_STEP = 3, 61, 13


def destination() -> dict[str, Any]:
    return {"w": torch.zeros(20, 15), "h": torch.zeros(7, dtype=torch.int16), "blob": 0, "step": 0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    writer = dcp.FileSystemWriter(tmp_path / "c", block_size=BLOCK)
    dcp.save(STATE, storage_writer=writer, no_dist=True, extra_files={"x": b"extra" * 9})
    return tmp_path / "c"


def flipped(path: Path, step: int) -> list[tuple[int, bytes]]:
    """Positions, and the content with one bit of that byte flipped; another bit each time."""
    whole = path.read_bytes()
    result = []
    for position in sorted({*range(0, len(whole), step), len(whole) - 1}):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        result.append((position, bytes(changed)))
    return result


def try_all(path: Path, step: int, attempt: Callable[[], None]) -> dict[int, dcp.CheckpointError]:
    """What ``attempt`` said at each position; where it said nothing it compared what it read."""
    original = path.read_bytes()
    said: dict[int, dcp.CheckpointError] = {}
    for position, content in flipped(path, step):
        path.write_bytes(content)
        try:
            attempt()
        except dcp.CheckpointError as error:
            said[position] = error
    path.write_bytes(original)
    attempt()
    return said


def loads(root: Path) -> Callable[[], None]:
    def attempt() -> None:
        into = destination()
        load(root, into)
        assert torch.equal(into["w"], STATE["w"]) and torch.equal(into["h"], STATE["h"])
        assert (into["blob"], into["step"]) == (STATE["blob"], STATE["step"])

    return attempt


def cause(error: dcp.CheckpointError) -> dcp.CheckpointError:
    if isinstance(error, dcp.CheckpointException):
        first = error.failures[0][0]
        assert isinstance(first, dcp.CheckpointError)
        return first
    return error


def test_in_the_manifest(root: Path) -> None:
    path = root / "manifest.json"
    said = try_all(path, MANIFEST_STEP, loads(root))
    assert len(said) == len(flipped(path, MANIFEST_STEP))
    for position, error in said.items():
        assert error.file == "manifest.json", (position, error)
        assert error.checkpoint == str(root)
        assert error.kind in ("digest_mismatch", "manifest_truncated", "manifest_invalid")


def test_in_the_data_file(root: Path) -> None:
    path = data_of(root) / "rank00000-00.safetensors"
    name = f"{data_of(root).name}/{path.name}"
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    header = try_all(path, HEADER_STEP, loads(root))
    assert len(header) == len(flipped(path, HEADER_STEP))
    said = {p: e for p, e in try_all(path, DATA_STEP, loads(root)).items() if p >= start}
    assert len(said) == len([p for p, _ in flipped(path, DATA_STEP) if p >= start])
    regions = {"w": (0, 1200), "h": (1200, 1214), "blob": (1214, 1 << 20)}
    for position, error in (*header.items(), *said.items()):
        assert error.file == name, (position, error)
        if position < start:
            assert (error.kind, error.tensor) == ("header_mismatch", None), (position, error)
            continue
        tensor = next(t for t, (a, b) in regions.items() if a <= position - start < b)
        assert (error.kind, error.tensor) == ("digest_mismatch", tensor), (position, error)


def test_in_the_digests(root: Path) -> None:
    path = data_of(root) / "rank00000.digests"
    said = try_all(path, 1, loads(root))
    assert len(said) == path.stat().st_size
    for error in said.values():
        assert error.kind == "digest_mismatch"
        assert error.file == f"{data_of(root).name}/{path.name}"


def test_in_an_extra_file(root: Path, read_extra: Callable[[Path, str], bytes]) -> None:
    path = data_of(root) / "extra" / "x"
    said = try_all(path, 1, lambda: _same(read_extra(root, "x"), b"extra" * 9))
    assert len(said) == path.stat().st_size
    assert {(e.kind, e.file) for e in said.values()} == {
        ("digest_mismatch", f"{data_of(root).name}/extra/x")
    }


def _same(found: bytes, expected: bytes) -> None:
    assert found == expected


def test_in_the_owner_record_it_changes_nothing(root: Path) -> None:
    """``owner.json`` serves clean-up alone; one that cannot be read proves nobody dead."""
    path = data_of(root) / OWNER_NAME
    assert json.loads(path.read_bytes())["pid"] > 0
    assert try_all(path, 1, loads(root)) == {}


def test_partial_reads_see_what_lies_in_their_blocks(root: Path) -> None:
    """Rows of a tensor are read by blocks: each flipped byte is found by every read of a part
    whose blocks hold it, and by no other."""
    path = data_of(root) / "rank00000-00.safetensors"
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    original = path.read_bytes()
    row_bytes = 15 * 4
    seen = 0
    for position in range(0, 1200, 37):
        changed = bytearray(original)
        changed[start + position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        for first, last in ((0, 4), (3, 9), (8, 13), (15, 20)):
            into = torch.zeros(last - first, 15)
            low = first * row_bytes // BLOCK * BLOCK
            high = min(-(-last * row_bytes // BLOCK) * BLOCK, 1200)
            try:
                _load_rows(root, into, first)
            except dcp.CheckpointError as error:
                seen += 1
                assert low <= position < high, (position, first, last)
                assert (cause(error).kind, cause(error).tensor) == ("digest_mismatch", "w")
            else:
                assert not low <= position < high, (position, first, last)
                assert torch.equal(into, STATE["w"][first:last])
    assert seen > 20


def test_columns_of_a_tensor_are_checked_as_well(root: Path) -> None:
    path = data_of(root) / "rank00000-00.safetensors"
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    changed = bytearray(path.read_bytes())
    changed[start + 60 * 7 + 8] ^= 1  # row 7, column 2
    path.write_bytes(changed)
    with pytest.raises(dcp.DamagedCheckpointError) as caught:
        _load_box(root, torch.zeros(20, 3), (0, 2))
    assert (caught.value.kind, caught.value.tensor) == ("digest_mismatch", "w")


def _load_rows(root: Path, into: torch.Tensor, first: int) -> None:
    _load_box(root, into, (first, 0))


def _load_box(root: Path, into: torch.Tensor, offsets: tuple[int, int]) -> None:
    """What one rank of a sharded load does: a box of "w"."""
    from tests.storage_backends.hand_plans import load as load_boxes

    load_boxes(reader(root), [("w", offsets, into)])


def test_saved_under_small_blocks(root: Path) -> None:
    """The premise of the tests above."""
    opened = reader(root)
    manifest, _ = opened.open_checkpoint(None)
    opened.close_checkpoint()
    assert manifest.block_size == BLOCK
    other = root.parent / "other"
    save(other, STATE)
    assert data_of(other).exists()
