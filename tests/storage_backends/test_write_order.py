"""Who writes and who digests a file, and in which order files become durable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dcp_engine.errors import InvalidPlanError, StorageError
from dcp_engine.format.digest import block_digests
from dcp_engine.storage import Buffer, ByteStore, ByteStoreFile
from storage_backends import digest_thread, write_files
from storage_backends.digest_thread import DigestThread
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.memory import MemoryStore
from storage_backends.open_files import OpenFiles
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.recording import RecordingByteStore
from storage_backends.testing.wrapping import WrappingByteStore
from tests.storage_backends.hand_plans import load_whole, save, whole

A = "a" * 32
BLOCK = 512


class Threads(WrappingByteStore):
    """Remembers which threads wrote data, and where."""

    def __init__(self, inner: ByteStore) -> None:
        super().__init__(inner)
        self.writers: set[str] = set()
        self.offsets: list[int] = []

    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        if name.endswith(".safetensors"):
            self.writers.add(threading.current_thread().name)
            self.offsets.append(offset)
        super().write_to(file, name, buffers, offset)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_files, "LARGE_BYTES", 4096)
    monkeypatch.setattr(write_files, "WRITE_BYTES", 3000)


def state(*, strided: bool = False) -> dict[str, torch.Tensor]:
    made = {
        "large": torch.randn(9000),
        "odd": torch.arange(70_001, dtype=torch.int32),
        "bytes": torch.randint(0, 255, (12_345,), dtype=torch.uint8),
        "small": torch.randn(100),
        "empty": torch.zeros(0, 3),
    }
    return {**made, "strided": torch.randn(80, 60).t()} if strided else made


def write(store: ByteStore, tensors: dict[str, torch.Tensor], threads: int) -> None:
    writer = ShardedWriter(lambda _: store, "here", thread_count=threads, block_size=BLOCK)
    writer._options = replace(writer._options, job_bytes=8192)
    save([writer], whole(tensors, text="x" * 10_000), A)


def digests_of(store: ByteStore) -> bytes:
    return store.get(f"data-{A}/rank00000.digests")


@pytest.mark.parametrize("block_size", [8192, 1 << 20])
def test_a_block_may_be_as_large_as_a_job_or_larger(block_size: int) -> None:
    store = MemoryStore()
    writer = ShardedWriter(lambda _: store, "here", thread_count=2, block_size=block_size)
    writer._options = replace(writer._options, job_bytes=8192)
    tensors = state(strided=True)
    save([writer], whole(tensors), A)
    loaded = load_whole(ShardedReader(lambda _: store, "here"), tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("strided", [False, True])
def test_whoever_digests_the_bytes_are_the_same(tmp_path: Path, strided: bool) -> None:
    tensors = state(strided=strided)
    found: list[bytes] = []
    for threads in (1, 2, 4):
        root = tmp_path / str(threads)
        write(FileSystemStore(root), tensors, threads)
        found.append(digests_of(FileSystemStore(root)))
    memory = MemoryStore()
    write(memory, tensors, 3)
    found.append(digests_of(memory))
    assert len(set(found)) == 1
    back = load_whole(ShardedReader(FileSystemStore, tmp_path / "2"), tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_one_thread_writes_a_local_file_from_begin_to_end(tmp_path: Path) -> None:
    store = Threads(FileSystemStore(tmp_path))
    write(store, state(), threads=4)
    assert store.writers == {threading.current_thread().name}
    assert store.offsets == sorted(store.offsets)
    assert len(store.offsets) > 20


@pytest.mark.parametrize(
    ("make", "strided"),
    [(FileSystemStore, True), (lambda _: MemoryStore(), False)],
    ids=["what is copied first", "a medium that takes several at once"],
)
def test_where_more_threads_help_they_write(
    tmp_path: Path, make: Callable[[Path], ByteStore], strided: bool
) -> None:
    store = Threads(make(tmp_path))
    write(store, state(strided=strided), threads=2)
    assert store.writers - {threading.current_thread().name}


def test_all_is_on_its_way_before_the_first_sync(tmp_path: Path) -> None:
    store = RecordingByteStore(FileSystemStore(tmp_path))
    write(store, state(), threads=2)
    data, digests = f"data-{A}/rank00000-00.safetensors", f"data-{A}/rank00000.digests"
    calls = [call for call in store.operations() if call[1] in (data, digests, f"data-{A}")]
    begin = calls.index(("sync", data))
    assert max(row for row, call in enumerate(calls) if call[0] == "write") < begin
    # The directory when both are durable, and nothing of them after it.
    assert calls[begin:] == [
        ("sync", data),
        ("close", data),
        ("size", data),
        ("sync", digests),
        ("close", digests),
        ("size", digests),
        ("sync_directory", f"data-{A}"),
    ]


class FailingSync(WrappingByteStore):
    def around(self, operation: str, name: str, call: Callable[[], object]) -> object:  # type: ignore[override]
        if operation == "sync" and name.endswith(".digests"):
            raise OSError(5, "Input/output error")
        return super().around(operation, name, call)


def test_a_failed_sync_leaves_nothing_open_or_behind(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        write(FailingSync(FileSystemStore(tmp_path)), state(), threads=2)
    assert str(caught.value.file).endswith(".digests")
    assert not (tmp_path / "manifest.json").exists()


def put(store: ByteStore, files: OpenFiles, name: str, data: bytes, size: int) -> None:
    file = store.create(name, size)
    file.write([memoryview(data)], 0)
    files.add(name, file, size)


def test_files_that_are_not_finished_are_removed(tmp_path: Path) -> None:
    store = FileSystemStore(tmp_path)
    with pytest.raises(ValueError, match="stop"), OpenFiles(store) as files:
        put(store, files, "a", b"12", 2)
        put(store, files, "b", b"34", 2)
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_length_is_refused_and_so_are_those_after_it(tmp_path: Path) -> None:
    store = FileSystemStore(tmp_path)
    with pytest.raises(InvalidPlanError) as caught, OpenFiles(store) as files:
        put(store, files, "a", b"12", 2)
        put(store, files, "b", b"34", 3)
        put(store, files, "c", b"56", 2)
        files.finish()
    assert caught.value.kind == "results_mismatch"
    assert caught.value.file == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_where_open_files_hold_memory_each_is_ended_at_once() -> None:
    store = MemoryStore()
    store.make_directory("")
    store.random_write = False
    watched = RecordingByteStore(store)
    with OpenFiles(watched) as files:
        put(watched, files, "a", b"12", 2)
        assert watched.operations()[-3:] == [("sync", "a"), ("close", "a"), ("size", "a")]


def work(rows: int) -> tuple[list[tuple[memoryview, np.ndarray]], np.ndarray]:
    data = memoryview(bytes(range(256)) * 2 * rows)
    out = np.zeros(rows, np.uint64)
    return [(data[row * BLOCK : (row + 1) * BLOCK], out[row : row + 1]) for row in range(rows)], out


def test_the_caller_does_what_the_thread_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    helped: list[bool] = []

    def held(view: memoryview, block_size: int) -> np.ndarray:
        if threading.current_thread() is threading.main_thread():
            helped.append(True)
            if len(helped) == 5:
                go_on.set()
        else:
            begun.set()
            go_on.wait(60)
        return block_digests(view, block_size)

    monkeypatch.setattr(digest_thread, "block_digests", held)
    pieces, out = work(6)
    with DigestThread(BLOCK) as digests:
        digests.add(pieces[:1])
        assert begun.wait(60)
        for piece in pieces[1:]:
            digests.add([piece])
        digests.finish()
    assert len(helped) == 5
    assert out.tolist() == [block_digests(view, BLOCK)[0] for view, _ in pieces]


def test_what_goes_wrong_in_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(view: memoryview, block_size: int) -> np.ndarray:
        raise MemoryError("no more")

    monkeypatch.setattr(digest_thread, "block_digests", failing)
    before = threading.active_count()
    with pytest.raises(MemoryError), DigestThread(BLOCK) as digests:
        digests.add(work(1)[0])
        digests.finish()
    assert threading.active_count() == before


def test_an_error_of_the_writer_ends_the_thread() -> None:
    before = threading.active_count()
    with pytest.raises(OSError, match="full"), DigestThread(BLOCK) as digests:
        digests.add(work(1)[0])
        raise OSError("full")
    assert threading.active_count() == before
