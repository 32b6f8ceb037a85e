"""``FileSystemStore`` against the medium: what lies there is looked at with ``os``, not with it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from dcp_engine.errors import DamagedCheckpointError, StorageError
from dcp_engine.storage import ReadRange
from storage_backends import vectored_io
from storage_backends.filesystem_store import FileSystemStore, path_of
from tests.locked_directories import lock


@pytest.fixture
def store(tmp_path: Path) -> FileSystemStore:
    made = FileSystemStore(tmp_path / "a" / "checkpoint")
    made.make_directory("data")
    return made


def view(data: bytes) -> memoryview:
    return memoryview(data)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_paths_and_urls(tmp_path: Path) -> None:
    assert path_of(tmp_path) == str(tmp_path)
    assert path_of("file:///some/where%20else") == "/some/where else"
    assert path_of("relative") == str(Path.cwd() / "relative")


def test_make_directory_makes_parents_and_syncs_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    FileSystemStore(tmp_path / "x" / "y").make_directory("data-1/extra")
    assert (tmp_path / "x/y/data-1/extra").is_dir()
    # The first of them: whoever made tmp_path may have done so this moment.
    above = [tmp_path.parent, tmp_path, tmp_path / "x", tmp_path / "x/y", tmp_path / "x/y/data-1"]
    assert synced == [str(path) for path in above]
    synced.clear()
    FileSystemStore(tmp_path / "x" / "y").make_directory("data-1/extra")
    assert synced == []


def test_many_buffers_go_out_in_few_calls_and_unjoined(
    store: FileSystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = os.pwritev

    def spy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", spy)
    parts = [bytes([i % 251]) * 3 for i in range(2500)]
    file = store.create("data/f")
    file.write([view(part) for part in parts], 5)
    file.sync()
    file.close()
    assert Path(store.url, "data/f").read_bytes() == b"\0" * 5 + b"".join(parts)
    assert calls == [1024, 1024, 452]


def test_partial_writes_and_reads_go_on(
    store: FileSystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write, real_read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: real_write(fd, [buffers[0][:7]], at))
    data = [b"0123456789", b"", b"abcdefghijklmnop", b"z"]
    file = store.create("data/f")
    file.write([view(part) for part in data], 0)
    file.close()
    assert Path(store.url, "data/f").read_bytes() == b"".join(data)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real_read(fd, [buffers[0][:3]], at))
    got = [bytearray(4), bytearray(6), bytearray(2)]
    store.read(
        "data/f",
        [
            ReadRange(0, memoryview(got[0])),
            ReadRange(4, memoryview(got[1])),
            ReadRange(25, memoryview(got[2])),
        ],
    )
    assert [bytes(part) for part in got] == [b"0123", b"456789", b"pz"]


def test_several_reads_open_the_file_once(
    store: FileSystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("data/f", b"0123456789")
    with pytest.raises(FileNotFoundError), store.opened("data/none"):
        pass
    opened: list[str] = []
    real = os.open

    def spy(path: str, *args: Any, **kwargs: Any) -> int:
        opened.append(path)
        return real(path, *args, **kwargs)

    buffers = [bytearray(4), bytearray(3), bytearray(5)]
    with store.opened("data/f") as read:
        monkeypatch.setattr(os, "open", spy)
        read([ReadRange(0, memoryview(buffers[0])), ReadRange(4, memoryview(buffers[1]))])
        # Whoever replaces the file does not mix into what is read from the old one.
        store.delete(["data/f"])
        opened.clear()
        read([ReadRange(7, memoryview(buffers[1]))])
        with pytest.raises(EOFError, match="data/f"):
            read([ReadRange(7, memoryview(buffers[2]))])
    assert opened == []
    assert [bytes(part) for part in buffers[:2]] == [b"0123", b"789"]


def test_adjacent_ranges_are_one_call(
    store: FileSystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("data/f", bytes(range(100)))
    calls: list[int] = []
    real = os.preadv

    def spy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    buffers = [bytearray(10) for _ in range(4)]
    offsets = [0, 10, 50, 60]
    store.read(
        "data/f", [ReadRange(o, memoryview(b)) for o, b in zip(offsets, buffers, strict=True)]
    )
    assert calls == [0, 50]
    assert [b[0] for b in buffers] == offsets


def test_read_past_the_end(store: FileSystemStore) -> None:
    store.put("data/f", b"abc")
    with pytest.raises(EOFError, match="data/f"):
        store.read("data/f", [ReadRange(1, memoryview(bytearray(3)))])


def test_missing_parent_is_not_created(store: FileSystemStore) -> None:
    with pytest.raises(FileNotFoundError):
        store.create("gone/f")
    with pytest.raises(FileNotFoundError):
        store.put("gone/f", b"")
    assert not Path(store.url, "gone").exists()


def test_create_refuses_a_name_that_is_taken(store: FileSystemStore) -> None:
    store.put("data/f", b"old")
    with pytest.raises(FileExistsError, match="data/f"):
        store.create("data/f")
    assert Path(store.url, "data/f").read_bytes() == b"old"


def test_put_replaces_at_once_and_leaves_nothing_beside(store: FileSystemStore) -> None:
    store.put("data/f", b"1")
    store.put("data/f", b"22")
    assert os.listdir(Path(store.url, "data")) == ["f"]
    assert Path(store.url, "data/f").read_bytes() == b"22"


def test_put_if_absent_has_one_winner(store: FileSystemStore) -> None:
    wins: list[int] = []
    barrier = threading.Barrier(8)

    def one(number: int) -> None:
        barrier.wait()
        try:
            store.put("data/key", str(number).encode(), if_absent=True)
        except FileExistsError:
            return
        wins.append(number)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert Path(store.url, "data/key").read_bytes() == str(wins[0]).encode()
    assert os.listdir(Path(store.url, "data")) == ["key"]


def test_failed_put_leaves_nothing(store: FileSystemStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    store.put("data/f", b"old")
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageError) as caught:
        store.put("data/f", b"new")
    assert (caught.value.kind, caught.value.errno) == ("disk_full", errno.ENOSPC)
    assert caught.value.file == "data/f"
    assert os.listdir(Path(store.url, "data")) == ["f"]
    assert Path(store.url, "data/f").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EACCES, "permission_denied"),
        (errno.EROFS, "permission_denied"),
        (errno.EPERM, "permission_denied"),
        (errno.EIO, "io_error"),
        (errno.EMFILE, "io_error"),
    ],
)
def test_errors_are_named(
    store: FileSystemStore, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    file = store.create("data/f")
    file.write([view(b"x")], 0)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError) as caught:
        file.sync()
    error = caught.value
    assert (error.kind, error.errno, error.file) == (kind, number, "data/f")
    assert error.checkpoint == store.url
    file.abort()


def test_abort_removes_the_file_and_the_directory_it_left_empty(store: FileSystemStore) -> None:
    before = descriptors()
    file = store.create("data/f")
    file.write([view(b"x")], 0)
    file.abort()
    file.abort()
    assert not Path(store.url, "data").exists()
    assert Path(store.url).is_dir()
    assert descriptors() == before


def test_delete_keeps_directories_that_hold_something(store: FileSystemStore) -> None:
    store.make_directory("data/extra")
    store.put("data/extra/a", b"")
    store.put("data/b", b"")
    store.delete(["data/extra/a", "data/never-there", "other/never-there"])
    assert os.listdir(Path(store.url, "data")) == ["b"]
    store.make_directory("data/extra")
    store.delete(["data"])
    assert Path(store.url, "data/extra").is_dir()
    store.delete(["data/extra/"])
    assert os.listdir(Path(store.url, "data")) == ["b"]


def test_list(store: FileSystemStore) -> None:
    store.make_directory("data/extra")
    store.make_directory("data-empty")
    store.put("data/extra/a", b"12")
    store.put("data/b", b"")
    store.put("manifest.json", b"{}")
    os.symlink("/etc", Path(store.url, "data", "link"))
    listed = {file.name: file.size for file in store.list()}
    assert listed.pop("data/link") > 0
    assert listed == {"data/extra/a": 2, "data/b": 0, "manifest.json": 2, "data-empty/": 0}
    assert {f.name for f in store.list("data/")} == {"data/extra/a", "data/b", "data/link"}
    assert {f.name for f in store.list("data-")} == {"data-empty/"}
    assert {f.name for f in store.list("data/e")} == {"data/extra/a"}
    assert list(store.list("nowhere/")) == []
    assert list(FileSystemStore(store.url + "x").list()) == []


def test_age_is_by_the_medium_s_clock(store: FileSystemStore) -> None:
    store.put("data/f", b"")
    stamp = os.stat(Path(store.url, "data/f")).st_mtime - 1000
    os.utime(Path(store.url, "data/f"), (stamp, stamp))
    (file,) = store.list("data/")
    assert file.age is not None
    assert 999 < file.age < 1100
    assert sorted(os.listdir(store.url)) == ["data"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "a/./b", "a/../../b", "a\0b", "."])
def test_names_do_not_leave_the_root(store: FileSystemStore, name: str) -> None:
    calls = [
        lambda: store.size(name),
        lambda: store.read(name, []),
        lambda: store.create(name),
        lambda: store.put(name, b""),
        lambda: store.delete([name]),
        lambda: store.make_directory(name),
        lambda: store.sync_directory(name),
        lambda: store.replace(name, "data/x"),
        lambda: store.replace("data/x", name),
        lambda: store.local_path(name),
    ]
    for call in calls:
        with pytest.raises(DamagedCheckpointError) as caught:
            call()
        assert caught.value.kind == "unsafe_path"


def test_symbolic_links_are_not_followed(store: FileSystemStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root = Path(store.url)
    os.symlink(outside / "secret", root / "data/link")
    os.symlink(outside, root / "directory")
    calls = [
        lambda: store.size("data/link"),
        lambda: store.read("data/link", [ReadRange(0, memoryview(bytearray(1)))]),
        lambda: store.read("directory/secret", [ReadRange(0, memoryview(bytearray(1)))]),
        lambda: store.create("directory/new"),
        lambda: store.put("directory/new", b""),
        lambda: store.make_directory("directory/new"),
        lambda: store.delete(["directory/secret"]),
        lambda: store.replace("data/link", "directory/secret"),
    ]
    for call in calls:
        with pytest.raises(DamagedCheckpointError) as caught:
            call()
        assert caught.value.kind == "unsafe_path"
    assert os.listdir(outside) == ["secret"]
    store.delete(["data/link", "directory"])
    assert (outside / "secret").read_bytes() == b"secret"
    assert not (root / "directory").is_symlink()


def test_a_root_behind_a_link_is_the_user_s_choice(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "alias")
    store = FileSystemStore(tmp_path / "alias")
    store.make_directory("data")
    store.put("data/f", b"x")
    assert store.get("data/f") == b"x"


def test_a_fifo_does_not_hang(store: FileSystemStore) -> None:
    os.mkfifo(Path(store.url, "data/pipe"))
    with pytest.raises(DamagedCheckpointError) as caught:
        store.read("data/pipe", [ReadRange(0, memoryview(bytearray(1)))])
    assert caught.value.kind == "unsafe_path"


def test_replace(store: FileSystemStore) -> None:
    store.put("manifest.json", b"old")
    store.put("data/tmp", b"new")
    store.replace("data/tmp", "manifest.json")
    assert store.get("manifest.json") == b"new"
    assert os.listdir(Path(store.url, "data")) == []
    with pytest.raises(FileNotFoundError):
        store.replace("data/tmp", "manifest.json")


def test_without_sync_nothing_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_descriptor: int) -> None:
        raise AssertionError("synced")

    monkeypatch.setattr(os, "fsync", never)
    store = FileSystemStore(tmp_path / "c", sync=False)
    assert not store.durable_sync
    store.make_directory("data")
    store.put("data/a", b"1")
    file = store.create("data/b")
    file.write([view(b"2")], 0)
    file.sync()
    file.close()
    store.sync_directory("")
    assert store.get("data/b") == b"2"


def test_a_file_system_without_directory_sync_is_accepted(
    store: FileSystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(errno.EINVAL, "no fsync here")

    monkeypatch.setattr(os, "fsync", refuse)
    store.sync_directory("data")
    file = store.create("data/f")
    with pytest.raises(StorageError):
        file.sync()
    file.abort()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        FileSystemStore(tmp_path / "f").make_directory("data")
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_a_closed_file_takes_no_more(store: FileSystemStore) -> None:
    file = store.create("data/f")
    file.close()
    file.close()
    with pytest.raises(StorageError, match="closed"):
        file.write([view(b"x")], 0)


def test_no_descriptor_stays_open(store: FileSystemStore) -> None:
    before = descriptors()
    store.put("data/f", b"x")
    list(store.list())
    store.get("data/f")
    store.sync_directory("")
    for name in ("data/missing", "data"):
        with pytest.raises((FileNotFoundError, DamagedCheckpointError, StorageError)):
            store.get(name)
    with pytest.raises(FileNotFoundError):
        store.create("missing/f")
    store.delete(["data/f"])
    assert descriptors() == before


def test_pwrite_that_writes_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_args: 0)
    with pytest.raises(OSError, match="nothing"):
        vectored_io.pwrite_all(0, [view(b"x")], 0)


def test_a_directory_that_may_not_be_read_is_listed_by_its_name(
    store: FileSystemStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data/open", "data/locked", "data/nothing"):
        store.make_directory(name)
    store.put("data/open/f", b"1")
    store.put("data/locked/f", b"2")
    lock(monkeypatch, "locked")
    listed = {(file.name, file.size, file.unreadable) for file in store.list()}
    assert listed == {
        ("data/open/f", 1, False),
        ("data/locked/", 0, True),
        ("data/nothing/", 0, False),
    }
    # Asked for itself it is an error.
    with pytest.raises(StorageError, match="list the directory"):
        store.list("data/locked/")


def test_a_directory_whose_entries_may_not_be_looked_at(
    store: FileSystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without the right to search it."""
    store.make_directory("data/open")
    store.make_directory("data/locked")
    store.put("data/open/f", b"1")
    store.put("data/locked/a", b"2")
    store.put("data/locked/hidden", b"2")
    real = os.stat

    def refuse(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if path == "hidden":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    listed = {(file.name, file.unreadable) for file in store.list()}
    assert listed == {("data/open/f", False), ("data/locked/", True)}
