"""Pruning: what is old and unnamed goes, everything else stays."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from dcp_engine.errors import StorageError
from storage_backends.filesystem import FileSystemReader, FileSystemStore, FileSystemWriter
from storage_backends.memory import MemoryStore
from storage_backends.prune import prune, prune_checkpoint
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.faulty import Fail, Fault, FaultyByteStore
from tests.locked_directories import lock
from tests.storage_backends.hand_plans import load_whole, save, ticket, whole, write

A, B, C, D = (letter * 32 for letter in "abcd")
STATE = {"w": torch.ones(100)}


def orphan(root: Path, save_id: str, age: float) -> Path:
    writer = FileSystemWriter(root)
    writer.begin_save(None, ticket(save_id))
    write(writer, whole(STATE), 0)
    directory = root / f"data-{save_id}"
    make_old(directory, age)
    return directory


def make_old(directory: Path, age: float) -> None:
    for path in (*directory.rglob("*"), directory):
        stamp = path.stat().st_mtime - age
        os.utime(path, (stamp, stamp))


def test_old_orphans_go_and_all_else_stays(tmp_path: Path) -> None:
    for step in ("step-1", "deep/step-2"):
        save([FileSystemWriter(tmp_path / step)], whole(STATE), A)
        make_old(tmp_path / step / f"data-{A}", 1e6)
    old = orphan(tmp_path / "step-1", B, 2 * 86400)
    young = orphan(tmp_path / "step-1", C, 3600)
    never = orphan(tmp_path / "step-3", D, 2 * 86400)
    (tmp_path / "step-3" / f"data-{C}").mkdir()
    make_old(tmp_path / "step-3" / f"data-{C}", 2 * 86400)
    notes = tmp_path / "step-1" / "data-notes"
    notes.mkdir()
    (notes / "x").write_bytes(b"")
    make_old(notes, 1e6)
    expected = {f"step-1/data-{B}", f"step-3/data-{D}", f"step-3/data-{C}"}

    preview = prune(tmp_path, dry_run=True)
    assert {entry.name for entry in preview.removed} == expected
    assert old.exists()
    report = prune(tmp_path)
    assert report == preview
    assert report.bytes_removed > 2 * 4096
    assert {(entry.name, entry.reason) for entry in report.kept} == {
        (f"step-1/data-{A}", "committed"),
        (f"deep/step-2/data-{A}", "committed"),
        (f"step-1/data-{C}", "too young"),
    }
    assert not old.exists() and not never.exists()
    assert young.exists() and (notes / "x").exists()
    assert load_whole(FileSystemReader(tmp_path / "step-1"), STATE)["w"].sum() == 100
    assert not prune(tmp_path).removed


def test_one_checkpoint(tmp_path: Path) -> None:
    save([FileSystemWriter(tmp_path)], whole(STATE), A)
    orphan(tmp_path, B, 100)
    orphan(tmp_path / "inner", C, 100)
    store = FileSystemStore(tmp_path)
    assert not prune_checkpoint(store, older_than=timedelta(seconds=200)).removed
    report = prune_checkpoint(store, older_than=50)
    assert [entry.name for entry in report.removed] == [f"data-{B}"]
    assert (tmp_path / "inner" / f"data-{C}").exists()


def test_a_set_without_collectives_is_committed_data(tmp_path: Path) -> None:
    plan = whole(STATE)
    writer = FileSystemWriter(tmp_path)
    writer.begin_save(None, ticket(A, use_collectives=False))
    writer.commit_columns(plan.global_plan(), [write(writer, plan, 0)], None)  # type: ignore[list-item]
    writer.end_save()
    make_old(tmp_path / f"data-{A}", 1e6)
    (kept,) = prune(tmp_path).kept
    assert kept.reason == "committed"


def test_a_set_that_hides_behind_a_manifest_goes(tmp_path: Path) -> None:
    """What a save with collectives could not remove of the set that it replaced."""
    plan = whole(STATE)
    writer = FileSystemWriter(tmp_path)
    writer.begin_save(None, ticket(A, use_collectives=False))
    writer.commit_columns(plan.global_plan(), [write(writer, plan, 0)], None)  # type: ignore[list-item]
    writer.end_save()
    refuses = Fault(operation="delete", action=Fail(OSError(5, "bad")), times=None)
    store = FaultyByteStore(FileSystemStore(tmp_path), [refuses])
    save([ShardedWriter(lambda _: store, tmp_path)], whole(STATE), B)
    assert (tmp_path / "manifest-rank00000.json").exists()
    assert prune(tmp_path).removed == ()
    (removed,) = prune(tmp_path, older_than=-1).removed
    assert removed.name == f"data-{A}"
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", f"data-{B}"}


def test_nothing_goes_where_the_manifest_cannot_be_read(tmp_path: Path) -> None:
    orphan(tmp_path, B, 1e6)
    (tmp_path / "manifest.json").write_bytes(b"?")
    (kept,) = prune(tmp_path).kept
    assert kept.reason == "unreadable manifest"
    assert (tmp_path / f"data-{B}").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = orphan(tmp_path / "outside", B, 1e6)
    inside = tmp_path / "root"
    inside.mkdir()
    (inside / f"data-{B}").symlink_to(outside)
    (inside / "more").symlink_to(tmp_path / "outside")
    assert not prune(inside).removed
    assert outside.exists()


def test_memory_and_failures() -> None:
    store = MemoryStore()
    store.make_directory(f"data-{A}")
    store.put(f"data-{A}/x", b"123")
    faulty = FaultyByteStore(store, [Fault(operation="delete", action=Fail(OSError(5, "bad")))])
    with pytest.raises(StorageError):
        prune(faulty, older_than=-1)
    assert prune(store, older_than=-1).bytes_removed == 3
    assert list(store.list()) == []
    assert prune(MemoryStore()).removed == ()


@pytest.mark.parametrize("locked", ["extra", f"data-{B}", "step-1"])
def test_what_may_not_be_looked_into_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    """Whatever its age; and what lies beside it goes all the same."""
    hidden = orphan(tmp_path / "step-1", B, 2 * 86400)
    (hidden / "extra").mkdir()  # empty: removing it would not fail
    make_old(hidden, 2 * 86400)
    names = sorted(tmp_path.rglob("*"))
    gone = orphan(tmp_path / "step-2", C, 2 * 86400)
    lock(monkeypatch, locked)
    report = prune(tmp_path)
    monkeypatch.undo()
    assert [entry.name for entry in report.removed] == [f"step-2/data-{C}"]
    expected = [] if locked == "step-1" else [(f"step-1/data-{B}", "unreadable")]
    assert [(entry.name, entry.reason) for entry in report.kept] == expected
    assert not gone.exists()
    assert [path for path in names if path.exists()] == names


@pytest.mark.parametrize("locked", ["extra", f"data-{A}"])
def test_a_save_removes_nothing_that_it_may_not_look_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    save([FileSystemWriter(tmp_path)], whole(STATE), A)
    (tmp_path / f"data-{A}" / "extra").mkdir()
    names = [p for p in tmp_path.rglob("*") if A in str(p)]
    lock(monkeypatch, locked)
    save([FileSystemWriter(tmp_path)], whole(STATE), B)
    monkeypatch.undo()
    assert [path for path in names if path.exists()] == names
    assert load_whole(FileSystemReader(tmp_path), STATE)["w"].sum() == 100
