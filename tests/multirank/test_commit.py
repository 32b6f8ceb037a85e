"""Real ranks: a save that ends badly leaves the old checkpoint, a load gets one of them whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

import dcp_engine as dcp
from dcp_engine.storage import ReadRange
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.faulty import Fail, Fault, FaultyByteStore
from storage_backends.testing.wrapping import WrappingByteStore
from tests.multirank import states

pytestmark = pytest.mark.multirank

T = TypeVar("T")
ROWS = 40_000
"""Of "w": 320 KB a rank of two, several blocks."""


class Hook(WrappingByteStore):
    """Runs ``action`` before (or after) the first call ``operation`` of a file so named."""

    def __init__(
        self, root: str, operation: str, suffix: str, action: Callable[[], object], when: str
    ) -> None:
        super().__init__(FileSystemStore(root))
        self._due = (operation, suffix)
        self._action: Callable[[], object] | None = action
        self._after = when == "after"

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        action, (due, suffix) = self._action, self._due
        if action is None or operation != due or not name.endswith(suffix):
            return call()
        self._action = None
        if not self._after:
            action()
        result = call()
        if self._after:
            action()
        return result


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def content(value: float | None) -> dict[str, Any]:
    """A sharded tensor, a replicated one and an object; None: a destination."""
    fill = -1.0 if value is None else value
    mesh, _ = states.meshes(dist.get_world_size())
    return {
        "w": distribute_tensor(torch.full((ROWS, 4), fill), mesh, [Shard(0)]),
        "r": torch.full((100,), fill),
        "step": value,
    }


def outcome(call: Callable[[], object]) -> dict[str, Any]:
    """What became of ``call`` on this rank."""
    try:
        call()
    except dcp.CheckpointException as error:
        first = next(iter(error.failures.values()))[0] if error.failures else None
        return {
            "kind": error.kind,
            "ranks": sorted(error.failures),
            "type": type(first).__name__,
            "file": getattr(first, "file", None),
            "tensor": getattr(first, "tensor", None),
            "text": str(error),
        }
    return {"kind": None}


def save(path: str, value: float, store: dcp.ByteStore | None = None, **options: Any) -> object:
    writer = ShardedWriter(lambda _: store or FileSystemStore(path), path)
    options = {"timeout": 60, "stall_timeout": 3, **options}
    return outcome(lambda: dcp.save(content(value), storage_writer=writer, **options))


def load(path: str, store: dcp.ByteStore | None = None) -> tuple[dict[str, Any], list[float]]:
    """The outcome, and the distinct values that this rank got."""
    into = content(None)
    reader = ShardedReader(lambda _: store or FileSystemStore(path), path)
    result = outcome(lambda: dcp.load(into, storage_reader=reader, timeout=60, stall_timeout=3))
    values = {*into["w"].to_local().unique().tolist(), *into["r"].unique().tolist(), into["step"]}
    return result, sorted(values) if result["kind"] is None else []


def first_save(path: str) -> None:
    assert save(path, 1.0) == {"kind": None}


def save_and_load(path: str, value: float) -> list[float]:
    assert save(path, value) == {"kind": None}
    result, values = load(path)
    assert result["kind"] is None, result
    return values


def next_job(path: str) -> list[float]:
    """Load what is there, save 3.0, load that."""
    result, values = load(path)
    assert result["kind"] is None, result
    return values + save_and_load(path, 3.0)


def listing(path: Path) -> list[str]:
    return sorted(os.listdir(path))


# A rank is killed


def save_and_die(path: str, victim: int, operation: str, suffix: str, when: str) -> Any:
    store: dcp.ByteStore = FileSystemStore(path)
    if dist.get_rank() == victim:
        store = Hook(path, operation, suffix, kill_me, when)
    return save(path, 2.0, store)


KILLS = {
    "a rank in its write": (1, "write", ".safetensors", "after", False),
    "the coordinator in its write": (0, "write", ".safetensors", "after", False),
    "the coordinator before the rename": (0, "replace", "manifest.json", "before", False),
    "the coordinator after the rename": (0, "replace", "manifest.json", "after", True),
}


@pytest.mark.parametrize("name", KILLS)
def test_a_kill_during_a_save(ranks: Any, tmp_path: Path, name: str) -> None:
    victim, operation, suffix, when, committed = KILLS[name]
    path = tmp_path / "c"
    ranks.run(2, first_save, str(path))
    before = listing(path)
    results = ranks.run(
        2, save_and_die, str(path), victim, operation, suffix, when, expect_kill=[victim]
    )
    survivor = results[1 - victim]
    assert survivor["kind"] is not None
    assert victim in survivor["ranks"] or f"rank {victim}" in survivor["text"], survivor
    if operation == "replace":
        assert survivor["kind"] == "commit_in_doubt"
    assert set(before) <= set(listing(path)), "the old data stays until somebody knows better"
    # The next job, with new processes, reads what the manifest says, and cleans up.
    expected = 2.0 if committed else 1.0
    assert ranks.run(2, next_job, str(path)) == [[expected, 3.0]] * 2
    left = listing(path)
    assert "manifest.json" in left
    if committed:
        # The killed coordinator's save replaced the first one, whose owner may live on.
        left = [n for n in left if n not in before or n == "manifest.json"]
    assert len(left) == 2, left


# A rank fails


def save_with_faults(path: str, failing: int, faults: list[Fault], capacity: int | None) -> Any:
    store: dcp.ByteStore = FileSystemStore(path)
    if dist.get_rank() == failing:
        store = FaultyByteStore(store, faults, capacity=capacity)
    return save(path, 2.0, store)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_on_one_rank(ranks: Any, tmp_path: Path, failing: int) -> None:
    path = tmp_path / "c"
    ranks.run(2, first_save, str(path))
    before = listing(path)
    for result in ranks.run(2, save_with_faults, str(path), failing, [], 100_000):
        assert (result["kind"], result["ranks"]) == ("disk_full", [failing])
        assert result["type"] == "StorageError"
        assert result["file"].endswith(f"rank0000{failing}-00.safetensors")
        assert str(path) in result["text"] and f"rank {failing}" in result["text"]
        assert "ree space" in result["text"]
    assert listing(path) == before
    assert [values for _, values in ranks.run(2, load, str(path))] == [[1.0]] * 2


def test_a_commit_in_doubt_is_so_on_all_ranks(ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    ranks.run(2, first_save, str(path))
    broken = Fail(OSError(errno.EIO, "broken"))
    fault = Fault(operation="sync_directory", name="", action=broken)
    for result in ranks.run(2, save_with_faults, str(path), 0, [fault], None):
        assert (result["kind"], result["ranks"]) == ("commit_in_doubt", [0])
        assert "next save" in result["text"]
    assert len(listing(path)) == 3
    assert [values for _, values in ranks.run(2, load, str(path))] == [[2.0]] * 2
    assert ranks.run(2, save_and_load, str(path), 3.0) == [[3.0]] * 2
    assert len(listing(path)) == 2


# Damage


def damage(path: Path, how: str) -> None:
    (data,) = path.glob("data-*")
    one, two = data / "rank00000-00.safetensors", data / "rank00001-00.safetensors"
    if how == "swapped":
        spare = path.parent / "spare"
        shutil.move(one, spare)
        shutil.move(two, one)
        shutil.move(spare, two)
    elif how == "flipped":
        content = bytearray(two.read_bytes())
        content[len(content) // 2] ^= 4
        two.write_bytes(content)
    else:
        two.unlink()


@pytest.mark.parametrize(
    ("how", "kind", "failing"),
    [
        ("swapped", {"header_mismatch", "file_short"}, {0, 1}),
        ("flipped", {"digest_mismatch"}, {1}),
        ("missing", {"file_missing"}, {1}),
    ],
)
def test_a_damaged_file_is_named_on_all_ranks(
    ranks: Any, tmp_path: Path, how: str, kind: set[str], failing: set[int]
) -> None:
    """Each rank reads its own half of "w": only who needs the file fails, and all hear of it."""
    path = tmp_path / "c"
    ranks.run(2, first_save, str(path))
    damage(path, how)
    for result, _ in ranks.run(2, load, str(path)):
        assert result["kind"] in kind, result["text"]
        assert set(result["ranks"]) <= failing and result["ranks"], result["text"]
        assert result["type"] == "DamagedCheckpointError"
        assert ".safetensors" in result["file"]
        if how == "flipped":
            assert result["tensor"] == "w"
        assert str(path) in result["text"] and "ake another checkpoint" in result["text"]


# Loads and the manifest


def overtaken_load(path: str, reading: int) -> list[float]:
    """Rank ``reading`` saves another checkpoint, alone, when it is about to read data."""
    store: dcp.ByteStore = FileSystemStore(path)
    if dist.get_rank() == reading:
        state = {"w": torch.full((ROWS, 4), 5.0), "r": torch.full((100,), 5.0), "step": 5.0}
        writer = dcp.FileSystemWriter(path)

        def overwrite() -> None:
            dcp.save(state, storage_writer=writer, no_dist=True)

        store = Hook(path, "size", ".safetensors", overwrite, "before")
    result, values = load(path, store)
    assert result["kind"] is None, result["text"]
    return values


@pytest.mark.parametrize("reading", [0, 1])
def test_all_ranks_of_an_overtaken_load_start_over(
    ranks: Any, tmp_path: Path, reading: int
) -> None:
    path = tmp_path / "c"
    ranks.run(2, first_save, str(path))
    assert ranks.run(2, overtaken_load, str(path), reading) == [[5.0]] * 2


class Stale(WrappingByteStore):
    """Shows the manifest as it was before."""

    def __init__(self, path: str, before: bytes) -> None:
        super().__init__(FileSystemStore(path))
        self._before = before

    def size(self, name: str) -> int:
        return len(self._before) if name == "manifest.json" else super().size(name)

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        if name != "manifest.json":
            super().read(name, ranges)
            return
        for item in ranges:
            item.buffer[:] = self._before[item.offset : item.offset + item.buffer.nbytes]


def load_with_a_stale_view(path: str, stale: int) -> list[float]:
    first_save(path)
    before = Path(path, "manifest.json").read_bytes()
    dist.barrier()
    # So large that it travels in pieces.
    assert save(path, 2.0, user_metadata={"note": "n" * 6_000_000}) == {"kind": None}
    assert Path(path, "manifest.json").stat().st_size > 6_000_000
    rank = dist.get_rank()
    result, values = load(path, Stale(path, before) if rank == stale else None)
    assert result["kind"] is None, result["text"]
    return values


def test_a_rank_with_a_stale_view_is_given_the_manifest(ranks: Any, tmp_path: Path) -> None:
    """Over a real store; see ``tests/end_to_end/test_manifest_hand_over.py`` for all the rest."""
    assert ranks.run(2, load_with_a_stale_view, str(tmp_path / "c"), 1) == [[2.0]] * 2
