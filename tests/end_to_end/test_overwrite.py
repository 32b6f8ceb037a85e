"""A checkpoint saved over another one: readers get one of them whole; what nobody needs any more
goes, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

import dcp_engine as dcp
from dcp_engine.format.names import OWNER_NAME
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.prune import prune
from storage_backends.testing.faulty import Fail, Fault, FaultyByteStore, LoseReply
from storage_backends.testing.wrapping import WrappingByteStore
from tests.end_to_end.checkpoints import (
    EXTRA,
    data_of,
    empty,
    load,
    reader,
    save,
    snapshot,
    state,
    value_at,
)

T = TypeVar("T")
MANIFEST = "manifest.json"
BROKEN = OSError(errno.EIO, "broken")


class Hook(WrappingByteStore):
    """Runs ``action`` before call ``operation`` of a file whose name ends with ``suffix``, once."""

    def __init__(
        self,
        root: Path,
        operation: str,
        suffix: str,
        action: Callable[[], object],
        *,
        times: int = 1,
    ) -> None:
        super().__init__(FileSystemStore(root))
        self._when = (operation, suffix)
        self._action = action
        self.left = times

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        if self.left and operation == self._when[0] and name.endswith(self._when[1]):
            self.left -= 1
            self._action()
        return call()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path / "c", state(1.0), extra_files=EXTRA)
    return tmp_path / "c"


def cause_of(error: dcp.CheckpointException) -> dcp.CheckpointError:
    cause = error.failures[0][0]
    assert isinstance(cause, dcp.CheckpointError)
    assert cause.hint and cause.checkpoint and cause.rank == 0
    return cause


# Readers


READS = [
    ("read", ".digests"),
    ("size", ".digests"),
    ("size", ".safetensors"),
    ("read", ".safetensors"),
]


@pytest.mark.parametrize(("operation", "suffix"), READS)
def test_a_load_in_whose_middle_another_save_commits(
    root: Path, operation: str, suffix: str
) -> None:
    """It starts over, and returns the new checkpoint whole."""
    store = Hook(root, operation, suffix, lambda: save(root, state(2.0)))
    into = empty()
    report = load(store, into)
    assert store.left == 0
    assert into["step"] == 2.0
    assert float(into["large"].min()) == float(into["large"].max()) == 2.0
    assert data_of(root).name == f"data-{report.save_id}"


def test_a_load_that_is_overtaken_again_and_again_gives_up(root: Path) -> None:
    value = [1.0]

    def overwrite() -> None:
        value[0] += 1
        save(root, state(value[0]))

    store = Hook(root, "read", ".safetensors", overwrite, times=1000)
    with pytest.raises(dcp.CheckpointException) as caught:
        load(store, empty())
    error = caught.value
    cause = cause_of(error)
    assert isinstance(cause, dcp.ConflictError)
    assert (error.kind, cause.kind) == ("superseded", "superseded")
    assert value[0] == 4.0, "three attempts"
    assert "load again" in str(error).lower()
    assert value_at(root) == 4.0


def test_two_overwrites_are_survived(root: Path) -> None:
    values = iter([2.0, 3.0])
    store = Hook(root, "size", ".safetensors", lambda: save(root, state(next(values))), times=2)
    into = empty()
    load(store, into)
    assert into["step"] == 3.0


def test_a_checkpoint_that_is_removed_under_a_load(root: Path) -> None:
    def remove() -> None:
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    store = Hook(root, "read", ".safetensors", remove)
    with pytest.raises(dcp.CheckpointException) as caught:
        load(store, empty())
    assert isinstance(cause_of(caught.value), dcp.NotFoundError)
    assert caught.value.kind == "not_found"


def test_a_load_of_items_starts_over_too(root: Path) -> None:
    """The same over DCP's life cycle, which planners of another origin take."""

    class Planner(dcp.DefaultLoadPlanner):
        def create_local_plan(self) -> dcp.LoadPlan:
            return super().create_local_plan()

    store = Hook(root, "read", ".safetensors", lambda: save(root, state(2.0)))
    into = empty()
    dcp.load(into, storage_reader=reader(store), planner=Planner(), no_dist=True, timeout=60)
    assert store.left == 0
    assert into["step"] == 2.0
    assert float(into["large"].min()) == float(into["large"].max()) == 2.0


# Savers


def test_the_new_one_takes_the_place_of_the_old_one(root: Path) -> None:
    old = data_of(root)
    save(root, state(2.0))
    assert value_at(root) == 2.0
    assert not old.exists()
    assert sorted(p.name for p in root.iterdir()) == sorted([MANIFEST, data_of(root).name])


def test_of_two_savers_to_one_place_the_second_one_loses(root: Path) -> None:
    """The one that commits while the other writes wins; the loser leaves nothing."""
    store = Hook(root, "sync_directory", "", lambda: save(root, state(3.0)))
    with pytest.raises(dcp.CheckpointException) as caught:
        save(store, state(2.0))
    cause = cause_of(caught.value)
    assert isinstance(cause, dcp.ConflictError)
    assert (caught.value.kind, cause.kind) == ("conflict", "conflict")
    assert "checkpoint_id" in str(caught.value)
    assert value_at(root) == 3.0
    assert sorted(p.name for p in root.iterdir()) == sorted([MANIFEST, data_of(root).name])


def test_of_two_first_savers_one_loses(tmp_path: Path) -> None:
    root = tmp_path / "new"
    store = Hook(root, "sync_directory", "", lambda: save(root, state(3.0)))
    with pytest.raises(dcp.CheckpointException) as caught:
        save(store, state(2.0))
    assert caught.value.kind == "conflict"
    assert value_at(root) == 3.0
    assert len(list(root.iterdir())) == 2


def test_a_place_that_was_emptied_while_a_save_ran(root: Path) -> None:
    """The checkpoint that was to be replaced is gone: that is a change like any other."""
    store = Hook(root, "sync_directory", "", (root / MANIFEST).unlink)
    with pytest.raises(dcp.CheckpointException) as caught:
        save(store, state(2.0))
    assert caught.value.kind == "conflict"
    assert not (root / MANIFEST).exists()


def test_overwrite_false(root: Path) -> None:
    before = snapshot(root)
    writer = dcp.FileSystemWriter(root, overwrite=False)
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(state(2.0), storage_writer=writer, no_dist=True)
    assert isinstance(cause_of(caught.value), dcp.UsageError)
    assert "overwrite" in str(caught.value)
    assert snapshot(root) == before
    dcp.save(state(2.0), storage_writer=dcp.FileSystemWriter(root / "new", overwrite=False))
    assert value_at(root / "new") == 2.0


def test_a_damaged_checkpoint_is_overwritten(root: Path) -> None:
    (root / MANIFEST).write_bytes(b"\0" * 100)
    save(root, state(2.0))
    assert value_at(root) == 2.0


def test_saving_where_torch_s_dcp_has_saved(tmp_path: Path) -> None:
    """Foreign files beside ours are nobody's business."""
    for name in (".metadata", "__0_0.distcp", "data-notes", "manifest.json.bak"):
        (tmp_path / name).write_bytes(b"foreign")
    before = snapshot(tmp_path)
    save(tmp_path, state(1.0))
    save(tmp_path, state(2.0))
    prune(tmp_path, older_than=0)
    assert value_at(tmp_path) == 2.0
    assert before.items() <= snapshot(tmp_path).items()
    assert len(list(tmp_path.iterdir())) == len(before) + 2


# What replaced checkpoints leave


def test_keep_replaced_leaves_it_for_prune(root: Path) -> None:
    first = data_of(root)
    save(root, state(2.0), keep_replaced=True)
    second = data_of(root)
    assert "rank00000-00.safetensors" in snapshot(first)
    save(root, state(3.0), keep_replaced=True)
    assert first.exists() and second.exists()
    report = prune(root, older_than=3600)
    assert {entry.reason for entry in report.kept} == {"too young", "committed"}
    report = prune(root, older_than=0, dry_run=True)
    assert first.exists() and report.bytes_removed > 0
    report = prune(root, older_than=0)
    assert {entry.name for entry in report.removed} == {first.name, second.name}
    assert value_at(root) == 3.0
    assert sorted(p.name for p in root.iterdir()) == sorted([MANIFEST, data_of(root).name])


def orphan(root: Path, save_id: str, *, pid: int, **changes: object) -> Path:
    """What a save that was killed leaves: an owner and some data."""
    directory = root / f"data-{save_id}"
    directory.mkdir(parents=True)
    owner: dict[str, Any] = json.loads((data_of(root) / OWNER_NAME).read_bytes())
    (directory / OWNER_NAME).write_text(json.dumps({**owner, "pid": pid, **changes}))
    (directory / "rank00000-00.safetensors").write_bytes(b"half a file")
    return directory


GONE = 2**22 + 1
"""Above the largest process number."""


def test_a_save_removes_what_dead_owners_left_and_only_that(root: Path) -> None:
    dead = orphan(root, "1" * 32, pid=GONE)
    given_up = orphan(root, "2" * 32, pid=0, host="elsewhere")
    kept = [
        orphan(root, "3" * 32, pid=os.getpid()),
        orphan(root, "4" * 32, pid=os.getppid()),
        orphan(root, "5" * 32, pid=GONE, host="elsewhere"),
        orphan(root, "6" * 32, pid=GONE, boot_id="before the last boot"),
    ]
    no_owner = orphan(root, "7" * 32, pid=GONE)
    (no_owner / OWNER_NAME).unlink()
    torn_owner = orphan(root, "8" * 32, pid=GONE)
    (torn_owner / OWNER_NAME).write_bytes(b'{"run_id":')
    foreign = [root / name for name in ("data-123", f"data-{'A' * 32}", f"xdata-{'1' * 32}")]
    for path in foreign:
        path.mkdir()
        (path / "file").write_bytes(b"mine")
    save(root, state(2.0))
    assert not dead.exists() and not given_up.exists()
    for path in (*kept, no_owner, torn_owner, *foreign):
        assert path.exists(), path
    assert value_at(root) == 2.0
    prune(root, older_than=0)
    for path in (*kept, no_owner, torn_owner):
        assert not path.exists(), path
    for path in foreign:
        assert (path / "file").read_bytes() == b"mine"
    assert value_at(root) == 2.0


def test_what_was_committed_meanwhile_is_no_garbage(root: Path) -> None:
    """Another job commits before this save cleans up, and ends: its owner is dead, its data not."""

    def other_job() -> None:
        save(root, state(3.0))
        owner = data_of(root) / OWNER_NAME
        owner.write_text(json.dumps({**json.loads(owner.read_bytes()), "pid": GONE}))

    store = Hook(root, "list", "data-", other_job)
    save(store, state(2.0))
    assert store.left == 0
    assert value_at(root) == 3.0


def test_a_failed_save_removes_nothing_but_its_own(root: Path) -> None:
    dead = orphan(root, "1" * 32, pid=GONE)
    before = snapshot(root)
    store = FaultyByteStore(
        FileSystemStore(root), [Fault(operation="replace", action=Fail(BROKEN))]
    )
    with pytest.raises(dcp.CheckpointException):
        save(store, state(2.0))
    assert snapshot(root) == before
    assert dead.exists()


def test_prune_below_a_root_with_many_checkpoints(tmp_path: Path) -> None:
    runs = [tmp_path / "run-a" / "step-1", tmp_path / "run-a" / "step-2", tmp_path / "run-b"]
    for number, place in enumerate(runs):
        save(place, state(float(number)))
        orphan(place, f"{number}" * 32, pid=os.getpid())
    uncommitted = tmp_path / "run-c" / f"data-{'f' * 32}"
    uncommitted.mkdir(parents=True)
    (uncommitted / "rank00000-00.safetensors").write_bytes(b"half")
    unreadable = tmp_path / "run-d"
    unreadable.mkdir()
    (unreadable / MANIFEST).write_bytes(b"?")
    (unreadable / f"data-{'e' * 32}").mkdir()
    (unreadable / f"data-{'e' * 32}" / "file").write_bytes(b"whose?")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    young = prune(tmp_path, older_than=3600)
    assert young.removed == ()
    old = time.time() - 7200
    for number, place in enumerate(runs[:2]):
        for path in (place / f"data-{number}".ljust(37, str(number))).iterdir():
            os.utime(path, (old, old))
    aged = prune(tmp_path, older_than=3600)
    assert sorted(entry.name for entry in aged.removed) == [
        f"run-a/step-1/data-{'0' * 32}",
        f"run-a/step-2/data-{'1' * 32}",
    ]
    everything = prune(tmp_path, older_than=0)
    assert sorted(entry.name for entry in everything.removed) == [
        f"run-b/data-{'2' * 32}",
        f"run-c/data-{'f' * 32}",
    ]
    assert {e.reason for e in everything.kept} == {"committed", "unreadable manifest"}
    assert (unreadable / f"data-{'e' * 32}" / "file").exists()
    assert (tmp_path / "notes.txt").read_bytes() == b"mine"
    assert [value_at(place) for place in runs] == [0.0, 1.0, 2.0]


def test_prune_does_not_follow_links(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"mine")
    (root / f"data-{'1' * 32}").symlink_to(outside)
    inside = root / f"data-{'2' * 32}"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    prune(root, older_than=0)
    assert (outside / "file").read_bytes() == b"mine"
    assert not inside.exists()
    assert value_at(root) == 1.0


# In doubt


def in_doubt(root: Path, faults: list[Fault]) -> dcp.CheckpointException:
    with pytest.raises(dcp.CheckpointException) as caught:
        save(FaultyByteStore(FileSystemStore(root), faults), state(2.0))
    error = caught.value
    cause = cause_of(error)
    assert isinstance(cause, dcp.ConflictError)
    assert (error.kind, cause.kind) == ("commit_in_doubt", "commit_in_doubt")
    assert "nothing was deleted" in str(error).lower()
    assert "next save" in str(error)
    return error


SYNC_FAILS = [Fault(operation="sync_directory", name="", action=Fail(BROKEN))]
RENAME_UNKNOWN = [
    Fault(operation="replace", action=LoseReply(BROKEN)),
    Fault(operation="size", name=MANIFEST, nth=3, times=None, action=Fail(BROKEN)),
]
NO_RENAME_UNKNOWN = [
    Fault(operation="replace", action=Fail(BROKEN)),
    Fault(operation="size", name=MANIFEST, nth=3, times=None, action=Fail(BROKEN)),
]


@pytest.mark.parametrize(
    ("faults", "committed"),
    [(SYNC_FAILS, True), (RENAME_UNKNOWN, True), (NO_RENAME_UNKNOWN, False)],
    ids=["the directory's fsync fails", "renamed, unknown", "not renamed, unknown"],
)
def test_a_commit_in_doubt(root: Path, faults: list[Fault], committed: bool) -> None:
    """Nothing is deleted, old or new; loads go by the manifest; the next save cleans up."""
    old = data_of(root)
    in_doubt(root, faults)
    directories = sorted(p for p in root.iterdir() if p.is_dir())
    assert len(directories) == 2 and old in directories
    assert value_at(root) == (2.0 if committed else 1.0)
    save(root, state(3.0))
    assert value_at(root) == 3.0
    left = sorted(p.name for p in root.iterdir())
    assert left == sorted([MANIFEST, data_of(root).name])
    assert value_at(root) == 3.0


def test_a_first_commit_in_doubt(tmp_path: Path) -> None:
    root = tmp_path / "c"
    in_doubt(root, SYNC_FAILS)
    assert value_at(root) == 2.0
    save(root, state(3.0))
    assert value_at(root) == 3.0
    assert len(list(root.iterdir())) == 2


def test_a_rename_whose_reply_was_lost_is_a_commit(root: Path) -> None:
    fault = Fault(operation="replace", action=LoseReply(BROKEN))
    save(FaultyByteStore(FileSystemStore(root), [fault]), state(2.0))
    assert value_at(root) == 2.0
    assert len(list(root.iterdir())) == 2


def test_a_rename_that_failed_is_none(root: Path) -> None:
    before = snapshot(root)
    fault = Fault(operation="replace", action=Fail(BROKEN))
    with pytest.raises(dcp.CheckpointException) as caught:
        save(FaultyByteStore(FileSystemStore(root), [fault]), state(2.0))
    assert isinstance(cause_of(caught.value), dcp.StorageError)
    assert caught.value.kind == "io_error"
    assert snapshot(root) == before
    assert value_at(root) == 1.0


class Odd(BaseException):
    """Not an Exception, and nobody's error."""


def test_any_other_error_in_the_commit_is_a_doubt(root: Path) -> None:
    fault = Fault(operation="replace", action=LoseReply(Odd("odd")))
    error = in_doubt(root, [fault])
    assert "odd" in str(error)
    assert value_at(root) == 2.0
