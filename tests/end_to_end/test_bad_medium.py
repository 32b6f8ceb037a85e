"""A medium that refuses, fills up, fails or lies: the save fails by name, what was there before
is whole, and nothing of the failed save remains."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dcp_engine as dcp
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.testing.faulty import (
    Fail,
    Fault,
    FaultyByteStore,
    FlipBit,
    LoseReply,
    ShortWrite,
    TornWrite,
)
from storage_backends.testing.recording import RecordingByteStore
from tests.end_to_end.checkpoints import (
    EXTRA,
    Refusal,
    data_of,
    empty,
    load,
    refused,
    save,
    snapshot,
    state,
    value_at,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["first save", "overwrite"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A place with a checkpoint of value 1.0, or with none."""
    place = tmp_path / "c"
    place.mkdir()
    if request.param == "overwrite":
        save(place, state(1.0), extra_files=EXTRA)
    return place


def unchanged(root: Path, before: dict[str, bytes | None]) -> None:
    """What was there is there, and nothing else; and the next save succeeds."""
    assert snapshot(root) == before
    if before:
        assert value_at(root) == 1.0
    save(root, state(3.0), extra_files=EXTRA)
    assert value_at(root) == 3.0
    assert len(list(root.iterdir())) == 2


def cause_of(error: dcp.CheckpointException, root: Path) -> dcp.CheckpointError:
    assert list(error.failures) == [0]
    cause = error.failures[0][0]
    assert isinstance(cause, dcp.CheckpointError), repr(cause)
    assert error.kind == cause.kind
    assert (cause.checkpoint, cause.rank) == (str(root), 0)
    assert cause.hint
    assert cause.hint[1:] in str(error) and str(root) in str(error)
    return cause


# Full


WRITTEN = [
    "owner.json",
    "rank00000-00.safetensors",
    "rank00000.digests",
    "extra/config.json",
    "extra/notes/a",
    "manifest.json.tmp",
]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_disk_that_is_full_in_the_middle_of(root: Path, tmp_path: Path, name: str) -> None:
    sample = tmp_path / "sample"
    save(sample, state(2.0), extra_files=EXTRA)
    sizes = [(data_of(sample) / file).stat().st_size for file in WRITTEN[:-1]]
    sizes.append((sample / "manifest.json").stat().st_size)
    at = WRITTEN.index(name)
    before = snapshot(root)
    capacity = sum(sizes[:at]) + sizes[at] // 2
    store = FaultyByteStore(FileSystemStore(root), capacity=capacity)
    with pytest.raises(dcp.CheckpointException) as caught:
        save(store, state(2.0), extra_files=EXTRA)
    cause = cause_of(caught.value, root)
    assert isinstance(cause, dcp.StorageError)
    assert (cause.kind, cause.errno) == ("disk_full", errno.ENOSPC)
    assert cause.file is not None and cause.file.startswith("data-")
    assert cause.file.partition("/")[2] == name
    assert "ree space" in str(caught.value)
    unchanged(root, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mount.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    place = small_disk / "c"
    save(place, state(1.0))
    before = snapshot(small_disk)
    free = os.statvfs(small_disk)
    large = {**state(2.0), "huge": [b"x" * (free.f_bavail * free.f_bsize)]}
    with pytest.raises(dcp.CheckpointException) as caught:
        save(place, large)
    cause = cause_of(caught.value, place)
    assert isinstance(cause, dcp.StorageError)
    assert (cause.kind, cause.errno) == ("disk_full", errno.ENOSPC)
    assert snapshot(small_disk) == before
    assert os.statvfs(small_disk).f_bavail == free.f_bavail
    assert value_at(place) == 1.0
    save(place, state(2.0))  # old and new fit beside each other
    assert value_at(place) == 2.0


# Refused


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir(mode=0o500)
    with pytest.raises(dcp.CheckpointException) as caught:
        save(tmp_path / "c", state())
    assert cause_of(caught.value, tmp_path / "c").kind == "permission_denied"


@pytest.mark.parametrize(
    ("operation", "number", "kind"),
    [
        ("make_directory", errno.EROFS, "permission_denied"),
        ("put", errno.EACCES, "permission_denied"),
        ("create", errno.EACCES, "permission_denied"),
        ("create", errno.ENOSPC, "disk_full"),
        ("write", errno.EDQUOT, "disk_full"),
        ("sync", errno.EIO, "io_error"),
        ("close", errno.EIO, "io_error"),
    ],
)
def test_an_operation_that_the_medium_refuses(
    root: Path, operation: str, number: int, kind: str
) -> None:
    """Every such call of a save in turn, with the error numbers that media give."""
    before = snapshot(root)
    for nth in range(1, 20):
        fault = Fault(operation=operation, nth=nth, action=Fail(OSError(number, "refused")))
        store = FaultyByteStore(FileSystemStore(root), [fault])
        try:
            save(store, state(2.0), extra_files=EXTRA)
        except dcp.CheckpointException as error:
            cause = cause_of(error, root)
            assert isinstance(cause, dcp.StorageError)
            assert (cause.kind, cause.errno) == (kind, number)
            assert cause.file == store.fired[0][1]
            assert snapshot(root) == before
        else:
            assert not store.fired
            assert nth > 1
            assert value_at(root) == 2.0
            return
    raise AssertionError("the save calls it more often than was thought")


@pytest.mark.parametrize("name", ["a dangling link", "a link to a file"])
def test_a_place_that_cannot_be_a_directory(tmp_path: Path, name: str) -> None:
    place = tmp_path / "c"
    if name == "a link to a file":
        (tmp_path / "target").write_bytes(b"mine")
    place.symlink_to(tmp_path / "target")
    before = snapshot(tmp_path)
    with pytest.raises(dcp.CheckpointException) as caught:
        save(place, state())
    assert isinstance(cause_of(caught.value, place), dcp.StorageError)
    assert snapshot(tmp_path) == before


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    place = tmp_path / "file" / "deep" / "c"
    with pytest.raises(dcp.CheckpointException) as caught:
        save(place, state())
    cause = cause_of(caught.value, place)
    assert isinstance(cause, dcp.StorageError)
    assert "is a file, not a directory" in str(cause)
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_a_directory_in_the_data_directory_s_place_is_not_touched(tmp_path: Path) -> None:
    """Two saves with one save id: the second one must not write into the first one's files."""
    save_id = "a" * 32
    save(tmp_path, state(1.0), use_collectives=False, save_id=save_id)
    before = snapshot(tmp_path)
    with pytest.raises(dcp.CheckpointException) as caught:
        save(tmp_path, state(2.0), use_collectives=False, save_id=save_id)
    assert isinstance(cause_of(caught.value, tmp_path), dcp.ConflictError)
    assert snapshot(tmp_path) == before
    assert value_at(tmp_path) == 1.0


# Failing and lying


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_write_that_is_torn(root: Path, nth: int) -> None:
    before = snapshot(root)
    torn = TornWrite(20, OSError(errno.EIO, "torn"))
    store = FaultyByteStore(FileSystemStore(root), [Fault(operation="write", nth=nth, action=torn)])
    with pytest.raises(dcp.CheckpointException) as caught:
        save(store, state(2.0))
    assert cause_of(caught.value, root).kind == "io_error"
    unchanged(root, before)


def test_a_medium_that_takes_fewer_bytes_than_it_says(root: Path) -> None:
    before = snapshot(root)
    fault = Fault(operation="write", name="*.safetensors", nth=2, action=ShortWrite(7))
    with pytest.raises(dcp.CheckpointException) as caught:
        save(FaultyByteStore(FileSystemStore(root), [fault]), state(2.0))
    cause = cause_of(caught.value, root)
    assert isinstance(cause, dcp.InvalidPlanError)
    assert cause.kind == "results_mismatch"
    assert cause.file is not None and cause.file.endswith("rank00000-00.safetensors")
    unchanged(root, before)


def test_a_bit_that_flips_on_the_way_to_the_disk_is_seen_by_the_load(tmp_path: Path) -> None:
    fault = Fault(operation="write", name="*.safetensors", nth=2, action=FlipBit(9))
    save(FaultyByteStore(FileSystemStore(tmp_path), [fault]), state(2.0))
    file = f"{data_of(tmp_path).name}/rank00000-00.safetensors"
    refused(
        lambda: load(tmp_path, empty()),
        Refusal(
            error=dcp.DamagedCheckpointError,
            kind="digest_mismatch",
            file=file,
            tensor="large",
        ),
        tmp_path,
    )


def test_a_fsync_that_failed_is_not_tried_again(root: Path) -> None:
    """After it the page cache may hold the data as clean: only a new file counts."""
    before = snapshot(root)
    fault = Fault(operation="sync", name="*.safetensors", action=Fail(OSError(errno.EIO, "lost")))
    recording = RecordingByteStore(FaultyByteStore(FileSystemStore(root), [fault]))
    with pytest.raises(dcp.CheckpointException):
        save(recording, state(2.0))
    synced = [name for operation, name in recording.operations() if operation == "sync"]
    assert len(synced) == 1
    unchanged(root, before)


@pytest.mark.parametrize("operation", ["size", "list", "read"])
def test_a_medium_that_fails_a_load(tmp_path: Path, operation: str) -> None:
    save(tmp_path, state(1.0))
    for nth in range(1, 20):
        fault = Fault(operation=operation, nth=nth, action=Fail(OSError(errno.EIO, "broken")))
        store = FaultyByteStore(FileSystemStore(tmp_path), [fault])
        try:
            load(store, empty())
        except dcp.CheckpointException as error:
            cause = cause_of(error, tmp_path)
            assert isinstance(cause, dcp.StorageError)
            assert (cause.kind, cause.errno) == ("io_error", errno.EIO)
            assert cause.file == store.fired[0][1]
        else:
            assert not store.fired
            assert nth > 1 or operation == "list"
            return
    raise AssertionError("the load calls it more often than was thought")


def test_a_clean_up_that_fails_does_not_hide_the_cause(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = OSError(errno.EIO, "broken")
    store = FaultyByteStore(
        FileSystemStore(root),
        [
            Fault(operation="sync", action=Fail(OSError(errno.ENOSPC, "full"))),
            Fault(operation="delete", action=Fail(broken), times=None),
        ],
    )
    with pytest.raises(dcp.CheckpointException) as caught:
        save(store, state(2.0))
    assert cause_of(caught.value, root).kind == "disk_full"
    assert "could not tidy up" in caplog.text
    if (root / "manifest.json").exists():
        assert value_at(root) == 1.0


# Descriptors


EXHAUST = """
import os, resource, sys
from pathlib import Path
import dcp_engine as dcp
from storage_backends.prune import prune
from tests.end_to_end.checkpoints import EXTRA, empty, load, save, snapshot, state, value_at

used = max(map(int, os.listdir("/proc/self/fd")))
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for free in range(8):
    root = Path(sys.argv[1]) / str(free)
    save(root, state(1.0), extra_files=EXTRA)
    before = snapshot(root)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, hard))
    while True:
        try:
            taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            break
    for _ in range(free):
        os.close(taken.pop())
    outcomes = []
    for attempt in (
        lambda: save(root, state(2.0), extra_files=EXTRA),
        lambda: load(root, empty()),
    ):
        try:
            attempt()
            outcomes.append("done")
        except dcp.CheckpointException as error:
            cause = error.failures[0][0]
            outcomes.append(f"{cause.kind} {cause.errno} {'ulimit' in str(error)}")
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if outcomes[0] == "done":
        assert value_at(root) == 2.0
    else:
        assert snapshot(root) == before, (free, sorted(set(snapshot(root)) - set(before)))
        assert value_at(root) == 1.0
    save(root, state(3.0))
    assert value_at(root) == 3.0
    # A save that could not remove what it replaced leaves it, for prune.
    prune(root, older_than=0)
    assert len(os.listdir(root)) == 2, (free, os.listdir(root))
    print(*outcomes, sep=" / ")
"""


def test_descriptors_that_run_out(tmp_path: Path) -> None:
    """Whatever number is left: saves and loads succeed, or say so and leave nothing behind."""
    ended = subprocess.run(
        [sys.executable, "-c", EXHAUST, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    refusal = f"io_error {errno.EMFILE} True"
    assert len(said) == 8
    assert said[0] == f"{refusal} / {refusal}"
    assert said[7] == "done / done"
    assert set(said) <= {"done / done", f"{refusal} / done", f"{refusal} / {refusal}"}


# Durability


def durable_calls(store: RecordingByteStore) -> list[tuple[str, str]]:
    watched = ("sync", "sync_directory", "replace")
    return [(o, n) for o, n in store.operations() if o in watched]


def test_everything_is_durable_before_the_manifest_takes_its_name(root: Path) -> None:
    store = RecordingByteStore(FileSystemStore(root))
    save(store, state(2.0), extra_files=EXTRA)
    calls = durable_calls(store)
    data = data_of(root).name
    commit = calls.index(("replace", "manifest.json"))
    before, after = calls[:commit], calls[commit + 1 :]
    written = {name for operation, name in store.operations() if operation == "create"}
    assert written == {
        f"{data}/rank00000-00.safetensors",
        f"{data}/rank00000.digests",
        f"{data}/extra/config.json",
        f"{data}/extra/notes/a",
        f"{data}/manifest.json.tmp",
    }
    assert {name for operation, name in before if operation == "sync"} == written
    directories = [name for operation, name in before if operation == "sync_directory"]
    assert set(directories) == {f"{data}/extra/notes", f"{data}/extra", data}
    assert directories[-1] == data
    assert after[0] == ("sync_directory", "")
    # No file is written to after its fsync, and none is created after that of its directory.
    log = store.operations()
    for name in written:
        assert max(i for i, c in enumerate(log) if c == ("write", name)) < log.index(("sync", name))
    last_created = max(i for i, c in enumerate(log) if c[0] == "create" and "tmp" not in c[1])
    assert last_created < log.index(("sync_directory", data))


class Counted:
    """Counts ``os.fsync`` by what is synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = 0
        self.directories = 0
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                self.directories += 1
            else:
                self.files += 1
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("sync_files", [True, False])
def test_sync_files_opts_out_of_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_files: bool
) -> None:
    counted = Counted(monkeypatch)
    place = tmp_path / "c"
    writer = dcp.FileSystemWriter(place, sync_files=sync_files)
    dcp.save(state(1.0), storage_writer=writer, extra_files=EXTRA, no_dist=True)
    if sync_files:
        assert counted.files == 6  # data, digests, two extra files, manifest, owner record
        assert counted.directories >= 5
    else:
        assert (counted.files, counted.directories) == (0, 0)
    assert value_at(place) == 1.0


def test_a_lost_reply_of_the_medium_is_a_failed_save(root: Path) -> None:
    """The data may be there; nobody said so."""
    before = snapshot(root)
    lost = LoseReply(OSError(errno.EIO, "no reply"))
    store = FaultyByteStore(
        FileSystemStore(root), [Fault(operation="close", name="*.safetensors", action=lost)]
    )
    with pytest.raises(dcp.CheckpointException):
        save(store, state(2.0))
    unchanged(root, before)
