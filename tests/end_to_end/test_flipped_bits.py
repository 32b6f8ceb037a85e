"""Every byte of a small checkpoint, one at a time: a flipped bit is found by name, or it changes
nothing of what is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.format.names import OWNER_NAME
from tests.end_to_end.checkpoints import data_of, load, reader
from tests.storage_backends.hand_plans import load as load_boxes

STATE: dict[str, Any] = {
    "w": torch.arange(300, dtype=torch.float32).reshape(20, 15),
    "h": torch.arange(7, dtype=torch.int16),
    "blob": "b" * 5000,
    "step": 12,
}
BLOCK = 512


def destination() -> dict[str, Any]:
    return {"w": torch.zeros(20, 15), "h": torch.zeros(7, dtype=torch.int16), "blob": 0, "step": 0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    writer = dcp.FileSystemWriter(tmp_path / "c", block_size=BLOCK)
    dcp.save(STATE, storage_writer=writer, no_dist=True, extra_files={"x": b"extra" * 9})
    return tmp_path / "c"


def try_all(
    path: Path, positions: Iterable[int], attempt: Callable[[], None]
) -> dict[int, dcp.CheckpointError]:
    """Flip one bit of each of these bytes of ``path`` in turn, another bit each time: what
    ``attempt`` said. Where it said nothing it has compared what it read."""
    original = path.read_bytes()
    said: dict[int, dcp.CheckpointError] = {}
    for position in positions:
        changed = bytearray(original)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        try:
            attempt()
        except dcp.CheckpointError as error:
            said[position] = error
    path.write_bytes(original)
    attempt()
    return said


def steps(begin: int, end: int, step: int) -> list[int]:
    """Every ``step``-th position, and the last one."""
    return sorted({*range(begin, end, step), end - 1})


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
    positions = steps(0, path.stat().st_size, 3)
    said = try_all(path, positions, loads(root))
    assert list(said) == positions
    for position, error in said.items():
        assert error.file == "manifest.json", (position, error)
        assert error.checkpoint == str(root)
        assert error.kind in ("digest_mismatch", "manifest_truncated", "manifest_invalid")


def test_in_a_data_file(root: Path) -> None:
    """Header, its padding, each tensor, the object."""
    path = data_of(root) / "rank00000-00.safetensors"
    name = f"{data_of(root).name}/{path.name}"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    text = content.rindex(b"}", 0, start) + 1
    assert start - text > 1000, "the header is padded"
    regions = {
        (0, text): (5, "header_mismatch", None),
        (text, start): (271, "header_mismatch", None),
        (start, start + 1200): (41, "digest_mismatch", "w"),
        (start + 1200, start + 1214): (1, "digest_mismatch", "h"),
        (start + 1214, len(content)): (199, "digest_mismatch", "blob"),
    }
    for (begin, end), (step, kind, tensor) in regions.items():
        positions = steps(begin, end, step)
        said = try_all(path, positions, loads(root))
        assert list(said) == positions
        for position, error in said.items():
            found = (error.kind, error.file, error.tensor)
            assert found == (kind, name, tensor), (position, error)


def test_in_the_digests(root: Path) -> None:
    path = data_of(root) / "rank00000.digests"
    positions = steps(0, path.stat().st_size, 2)
    said = try_all(path, positions, loads(root))
    assert list(said) == positions
    for error in said.values():
        assert error.kind == "digest_mismatch"
        assert error.file == f"{data_of(root).name}/{path.name}"


def test_in_an_extra_file(root: Path, read_extra: Callable[[Path, str], bytes]) -> None:
    path = data_of(root) / "extra" / "x"
    positions = range(path.stat().st_size)
    said = try_all(path, positions, lambda: _same(read_extra(root, "x"), b"extra" * 9))
    assert list(said) == list(positions)
    assert {(e.kind, e.file) for e in said.values()} == {
        ("digest_mismatch", f"{data_of(root).name}/extra/x")
    }


def _same(found: bytes, expected: bytes) -> None:
    assert found == expected


def test_in_the_owner_record_it_changes_nothing(root: Path) -> None:
    """``owner.json`` serves clean-up alone; one that cannot be read proves nobody dead."""
    path = data_of(root) / OWNER_NAME
    assert json.loads(path.read_bytes())["pid"] > 0
    assert try_all(path, range(path.stat().st_size), loads(root)) == {}


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
    load_boxes(reader(root), [("w", offsets, into)])
