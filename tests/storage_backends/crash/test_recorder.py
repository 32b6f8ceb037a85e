"""The record holds everything: what it says and what lies in the directory are the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_backends.testing.crash import Recorder, RecordError, recording
from storage_backends.testing.crash.jobs import CHECKPOINT, save_alone
from storage_backends.testing.crash.operations import (
    Create,
    Link,
    MakeDirectory,
    Mark,
    RemoveDirectory,
    Rename,
    Sync,
    SyncAll,
    SyncFailed,
    Truncate,
    Unlink,
    Write,
)
from storage_backends.testing.crash.persistence import DiskAtPosition
from storage_backends.testing.crash.recorder import image_of


def recorded(root: Path, program: Callable[[Path], object]) -> list[object]:
    """The operations of ``program``, checked one by one against the directory."""
    recorder = Recorder(root, verify=True)
    with recording(recorder):
        program(root)
    return [step.operation for step in recorder.record().steps]


def test_each_function_of_os(tmp_path: Path) -> None:
    def program(root: Path) -> None:
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        os.mkdir("d", dir_fd=directory)
        file = os.open("f", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=directory)
        os.write(file, b"12")
        os.writev(file, [b"3", b"4"])
        os.pwrite(file, b"5", 6)
        os.pwritev(file, [b"6", memoryview(b"7")], 8)
        os.ftruncate(file, 9)
        os.fsync(file)
        os.fdatasync(file)
        os.close(file)
        os.truncate(root / "f", 3)
        os.link("f", "g", src_dir_fd=directory, dst_dir_fd=directory)
        os.rename(root / "g", root / "d" / "g")
        os.replace("f", "d/h", src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
        os.unlink("d/g", dir_fd=directory)
        os.remove(root / "d" / "h")
        os.rmdir("d", dir_fd=directory)
        os.sync()
        os.close(directory)

    assert recorded(tmp_path, program) == [
        MakeDirectory(0, "d", 1),
        Create(0, "f", 2),
        Write(2, 0, b"12"),
        Write(2, 2, b"34"),
        Write(2, 6, b"5"),
        Write(2, 8, b"67"),
        Truncate(2, 9),
        Sync(2),
        Sync(2),
        Truncate(2, 3),
        Link(0, "g", 2),
        Rename(0, "g", 1, "g"),
        Rename(0, "f", 1, "h"),
        Sync(0),
        Unlink(1, "g"),
        Unlink(1, "h"),
        RemoveDirectory(0, "d"),
        SyncAll(),
    ]


def test_streams_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"0123456789")

    def program(root: Path) -> None:
        (root / "text").write_text("héllo\n", encoding="utf-8")
        with (root / "bytes").open("wb") as stream:
            stream.write(b"x" * 20_000)
            os.fsync(stream.fileno())  # what a buffer holds is not there yet
            stream.write(b"y")
        with open(root / "old", "r+b") as stream:
            stream.seek(3)
            stream.write(b"abc")
            stream.truncate(8)
        with open(root / "text", "a", encoding="utf-8") as text:
            text.write("more")
        with open(root / "raw", "wb", buffering=0) as raw:
            raw.write(memoryview(b"raw"))
        with pytest.raises(FileExistsError):
            (root / "raw").open("xb")
        with open(root / "old", "wb"):
            pass
        shutil.rmtree(root / "nothing", ignore_errors=True)
        assert (root / "bytes").read_bytes()[-2:] == b"xy"

    operations = recorded(tmp_path, program)
    assert Write(1, 3, b"abc") in operations or Write(0, 3, b"abc") in operations
    sizes = [len(op.data) for op in operations if isinstance(op, Write)]
    assert sum(sizes) == 7 + 20_001 + 3 + 4 + 3
    assert image_of(tmp_path).files == {
        "text": "héllo\nmore".encode(),
        "bytes": b"x" * 20_000 + b"y",
        "raw": b"raw",
        "old": b"",
    }


def test_a_number_of_an_inode_that_comes_back_is_a_new_file(tmp_path: Path) -> None:
    def program(root: Path) -> None:
        for number in range(20):
            (root / "f").write_bytes(b"%d" % number)
            (root / "f").unlink()

    created = [op for op in recorded(tmp_path, program) if isinstance(op, Create)]
    assert [op.node for op in created] == list(range(1, 21))


def test_what_is_elsewhere_is_not_recorded(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()

    def program(root: Path) -> None:
        (outside / "f").write_text("x")
        os.rename(outside / "f", outside / "g")
        os.mkdir(outside / "d")
        os.truncate(outside / "g", 0)
        os.unlink(outside / "g")
        os.rmdir(outside / "d")
        with open(outside / "h", "wb") as stream:
            os.fsync(stream.fileno())

    assert recorded(inside, program) == []


@pytest.mark.parametrize(
    "program",
    [
        lambda root: os.symlink("a", root / "b"),
        lambda root: os.mkfifo(root / "b"),
        lambda root: os.rename(root / "held", root.parent / "gone"),
        lambda root: os.open(root / "b", os.O_WRONLY | os.O_CREAT | os.O_SYNC),
    ],
    ids=["symlink", "fifo", "over the border", "synchronous"],
)
def test_what_the_record_cannot_say_is_refused(
    tmp_path: Path, program: Callable[[Path], object]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "held").write_bytes(b"")
    with pytest.raises(RecordError):
        recorded(root, program)


def test_a_write_that_goes_past_it_is_found_out(tmp_path: Path) -> None:
    def program(root: Path) -> None:
        (root / "f").write_bytes(b"seen")
        code = "import sys; open(sys.argv[1], 'ab').write(b'unseen')"
        subprocess.run([sys.executable, "-c", code, str(root / "f")], check=True)

    with pytest.raises(RecordError, match="does not explain"):
        recorded(tmp_path, program)


def test_faults_fail_the_operation_and_are_in_the_record(tmp_path: Path) -> None:
    kinds: list[str] = []

    def fault(kind: str) -> OSError | None:
        kinds.append(kind)
        return OSError(errno.EIO, "broken") if kinds.count("sync") == 1 and kind == "sync" else None

    recorder = Recorder(tmp_path, fault=fault, verify=True)
    with recording(recorder), open(tmp_path / "f", "wb", buffering=0) as stream:
        stream.write(b"x")
        with pytest.raises(OSError, match="broken"):
            os.fsync(stream.fileno())
        os.fsync(stream.fileno())
        recorder.mark("here")
    assert kinds == ["create", "write", "sync", "sync"]
    assert [step.operation for step in recorder.record().steps] == [
        Create(0, "f", 1),
        Write(1, 0, b"x"),
        SyncFailed(1),
        Sync(1),
        Mark("here"),
    ]


def test_a_dead_thread_does_nothing_more(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.refuse("dead one")
    errors: list[OSError] = []

    def life() -> None:
        try:
            (tmp_path / "f").write_bytes(b"")
        except OSError as error:
            errors.append(error)

    with recording(recorder):
        thread = threading.Thread(target=life, name="dead one")
        thread.start()
        thread.join()
    assert errors and not (tmp_path / "f").exists()


def test_everything_is_put_back(tmp_path: Path) -> None:
    import builtins
    import io

    before = [os.open, os.fsync, os.replace, io.open, builtins.open]
    with pytest.raises(ZeroDivisionError), recording(Recorder(tmp_path)):
        assert os.open is not before[0]
        raise ZeroDivisionError
    assert [os.open, os.fsync, os.replace, io.open, builtins.open] == before


@pytest.mark.parametrize("label", ["first", "second"])
def test_a_save_of_the_engine_is_recorded_whole(tmp_path: Path, label: str) -> None:
    """Replayed from its record alone, each moment of it is what lay there at that moment."""
    if label == "second":
        save_alone(tmp_path, "old")
    operations = recorded(tmp_path, lambda root: save_alone(root, "new"))
    assert sum(isinstance(op, Sync) for op in operations) >= 14
    assert (tmp_path / CHECKPOINT / "manifest.json").exists()


NAMES = st.sampled_from(["a", "b", "d/a", "d/b", "e"])
ACTIONS = st.one_of(
    st.tuples(st.just("write"), NAMES, st.integers(0, 9000), st.binary(max_size=40)),
    st.tuples(st.just("create"), NAMES),
    st.tuples(st.just("truncate"), NAMES, st.integers(0, 9000)),
    st.tuples(st.just("unlink"), NAMES),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.just("link"), NAMES, NAMES),
    st.tuples(st.just("mkdir"), st.sampled_from(["d", "e"])),
    st.tuples(st.just("rmdir"), st.sampled_from(["d", "e"])),
    st.tuples(st.just("sync"), NAMES | st.just("d")),
)


def act(root: Path, action: tuple[object, ...]) -> None:
    kind, name, *rest = action
    path = root / str(name)
    if kind == "write":
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, rest[1], rest[0])  # type: ignore[call-overload]
        finally:
            os.close(descriptor)
    elif kind == "create":
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    elif kind == "truncate":
        os.truncate(path, rest[0])  # type: ignore[arg-type]
    elif kind == "rename":
        os.rename(path, root / str(rest[0]))
    elif kind == "link":
        os.link(path, root / str(rest[0]))
    elif kind == "sync":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    else:
        getattr(os, str(kind))(path)


@given(st.lists(ACTIONS, max_size=25))
@settings(max_examples=150)
def test_any_program_is_recorded_as_it_was(actions: list[tuple[object, ...]]) -> None:
    """And what is left when all of it arrived is what lies there; when everything is synced,
    nothing else can be."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        recorder = Recorder(root, verify=True)
        with recording(recorder):
            for action in actions:
                try:
                    act(root, action)
                except OSError:
                    continue
            os.sync()
        disk = DiskAtPosition(recorder.record_before())
        for step in recorder.record().steps:
            disk.advance(step.operation)
        assert disk.pending == 0
        assert disk.image(()).digest == image_of(root).digest
