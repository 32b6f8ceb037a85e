"""How much input and output known cases take, counted and never timed: the guard of the
benchmark ``python -m benchmarks io``."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine
from dcp_engine.planning.load_plan import plan_boxes
from dcp_engine.state.values import Box
from storage_backends import read_files
from storage_backends.filesystem import FileSystemReader, FileSystemWriter

BLOCK = 65536
PAGE = 4096

Counts = Counter[str]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """``with counting() as counts``: system calls of files, and bytes by direction."""

    @contextmanager
    def count() -> Iterator[Counts]:
        counts: Counts = Counter()
        lock = threading.Lock()

        def watch(name: str, moves: str = "") -> None:
            original = getattr(os, name)

            def counted(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                with lock:
                    counts[name] += 1
                    if moves:
                        counts[moves] += result
                return result

            patch.setattr(os, name, counted)

        with monkeypatch.context() as patch:
            watch("pwritev", "written")
            watch("preadv", "read")
            for name in ("fsync", "replace", "link", "mkdir"):
                watch(name)
            yield counts

    return count


def stored(root: Path) -> dict[str, int]:
    """Sizes by the last part of the name."""
    return {path.name: path.stat().st_size for path in root.rglob("*") if path.is_file()}


def save(state: dict[str, Any], path: Path, **options: Any) -> None:
    dcp_engine.save(state, storage_writer=FileSystemWriter(path, **options), no_dist=True)


def load(state: dict[str, Any], path: Path, **options: Any) -> int:
    report = dcp_engine.load(state, storage_reader=FileSystemReader(path, **options), no_dist=True)
    assert report.bytes_read is not None
    return report.bytes_read


def small(count: int) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((256,), float(i)) for i in range(count)}


def large() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(3 << 20), "b": torch.randn(5 << 18).double(), "c": torch.randn(7)}


def test_every_byte_is_written_once(counting: Callable[[], Any], tmp_path: Path) -> None:
    with counting() as counts:
        save(large(), tmp_path / "x")
    sizes = stored(tmp_path / "x")
    assert sorted(sizes) == ["manifest.json", "owner.json", "rank00000-00.safetensors",
                             "rank00000.digests"]  # fmt: skip
    assert counts["written"] == sum(sizes.values())


@pytest.mark.parametrize("tensors", [1, 3000])
def test_files_not_tensors_cost_syncs_and_renames(
    counting: Callable[[], Any], tmp_path: Path, tensors: int
) -> None:
    save(small(1), tmp_path / "first")  # makes directories above that are not there yet
    with counting() as counts:
        save(small(tensors), tmp_path / "x")
    assert counts["replace"] == 2, "owner and manifest"
    # Four files; the root's parent, the root (as often as an entry was made in it), and the data
    # directory (likewise).
    assert counts["fsync"] <= 12
    assert counts["link"] == 0


def test_without_sync_nothing_is_synced(counting: Callable[[], Any], tmp_path: Path) -> None:
    with counting() as counts:
        save(large(), tmp_path / "x", sync_files=False)
    assert counts["fsync"] == 0


def test_small_tensors_are_written_together(counting: Callable[[], Any], tmp_path: Path) -> None:
    with counting() as counts:
        save(small(3000), tmp_path / "x")
    # Headers, digests, owner, manifest; and 1,024 buffers at a time.
    assert counts["pwritev"] <= 5 + 3
    payload = 3000 * 1024
    assert counts["written"] < 1.2 * payload


def test_small_tensors_are_read_together(counting: Callable[[], Any], tmp_path: Path) -> None:
    state = small(3000)
    save(state, tmp_path / "x")
    with counting() as counts:
        data = load({name: torch.zeros_like(t) for name, t in state.items()}, tmp_path / "x")
    assert data == 3000 * 1024
    assert counts["read"] <= data + sum(
        size for name, size in stored(tmp_path / "x").items() if "safetensors" not in name
    ) + header(tmp_path / "x")
    # Manifest, digests, header and its length; 1,024 buffers at a time.
    assert counts["preadv"] <= 6 + 3


def header(path: Path) -> int:
    """Bytes in front of the data, and the eight that are read first."""
    [file] = path.rglob("rank00000-00.safetensors")
    return 8 + 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("threads", [1, 3])
def test_large_tensors_are_read_once_where_they_belong(
    counting: Callable[[], Any], tmp_path: Path, threads: int
) -> None:
    state = large()
    save(state, tmp_path / "x")
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with counting() as counts:
        data = load(target, tmp_path / "x", thread_count=threads)
    assert data == sum(tensor.nbytes for tensor in state.values())
    assert counts["read"] - data < 64 << 10
    assert counts["preadv"] <= 8 + data // read_files.READ_BYTES + 2
    for name, tensor in state.items():
        assert torch.equal(target[name], tensor)


def test_a_row_range_costs_itself_and_two_blocks(
    counting: Callable[[], Any], tmp_path: Path
) -> None:
    save({"w": torch.arange(4_000_000, dtype=torch.float32).view(-1, 1000)}, tmp_path)
    with dcp_engine.Checkpoint(FileSystemReader(tmp_path), tmp_path) as checkpoint:
        checkpoint["w"][:1]  # the header and the digests, once
        with counting() as counts:
            rows = checkpoint["w"][1000:1100]
    assert rows.shape == (100, 1000)
    assert counts["read"] <= rows.nbytes + 2 * BLOCK


@pytest.mark.parametrize(
    ("verify", "waste"), [(True, 2 * BLOCK), (False, 0)], ids=["digests", "none"]
)
def test_a_part_reads_its_blocks_only(
    counting: Callable[[], Any], tmp_path: Path, verify: bool, waste: int
) -> None:
    """What one of two ranks needs of a tensor that one rank wrote."""
    whole = torch.randn(1000, 700)
    save({"w": whole}, tmp_path / "x")
    half = FileSystemReader(tmp_path / "x", verify_digests=verify)
    manifest, _ = half.open_checkpoint(None)
    target = torch.zeros(500, 700)
    with counting() as counts:
        data = half.read_columns(manifest, *upper_half(manifest, target), lambda: None)
    half.close_checkpoint()
    assert torch.equal(target, whole[:500])
    assert data <= target.nbytes + waste
    assert counts["read"] <= data + 3 * PAGE


def upper_half(manifest: Any, target: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
    box = Box(offsets=(0, 0), sizes=(500, 700))
    return plan_boxes(manifest.tensors["w"], [box]), [target]


@pytest.mark.parametrize(("width", "excess"), [(2 * read_files.MIN_SKIP, 1.0), (256, 2.0)])
def test_columns_without_digests_read_no_gap_that_is_worth_a_call(
    tmp_path: Path, counting: Callable[[], Any], width: int, excess: float
) -> None:
    rows = 64
    whole = torch.randint(0, 255, (2, rows, width), dtype=torch.uint8)
    save({"w": whole}, tmp_path / "c")
    reader = FileSystemReader(tmp_path / "c", verify_digests=False, thread_count=1)
    manifest, _ = reader.open_checkpoint(None)
    for half in range(2):
        target = torch.zeros(2, rows, width // 2, dtype=torch.uint8)
        box = Box(offsets=(0, 0, half * width // 2), sizes=tuple(target.shape))
        columns = plan_boxes(manifest.tensors["w"], [box])
        with counting() as counts:
            reader.read_columns(manifest, columns, [target], lambda: None)
        assert torch.equal(target, whole[:, :, half * width // 2 : (half + 1) * width // 2])
        assert counts["read"] <= excess * target.nbytes + PAGE
        assert (counts["preadv"] >= 2 * rows) == (excess == 1.0)
    reader.close_checkpoint()
