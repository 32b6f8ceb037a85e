"""``max_inflight_bytes``: what a save and a load hold beside the tensors, with any threads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import dcp_engine
from dcp_engine.storage import Buffer, ByteStore, ByteStoreFile, ReadRange
from storage_backends import write_files
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_reader import INFLIGHT_PER_THREAD, ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.tensor_bytes import contiguous_slices
from storage_backends.testing.wrapping import WrappingByteStore


class Watched(WrappingByteStore):
    """Adds up the buffers that are on their way at one time and are no tensor's own memory."""

    def __init__(self, inner: ByteStore, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(inner)
        self._own = [(t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in tensors]
        self._lock = threading.Lock()
        self._held = self._calls = 0
        self.most_bytes = self.most_calls = self.foreign_bytes = 0
        self._places: list[tuple[int, int]] = []

    @contextmanager
    def _on_their_way(self, buffers: Sequence[Buffer]) -> Iterator[None]:
        places = [self._place(b) for b in buffers if b.nbytes]
        places = [place for place in places if not self._is_own(place)]
        foreign = sum(end - begin for begin, end in places)
        with self._lock:
            self._places += places
            self._held += foreign
            self._calls += 1
            self.foreign_bytes += foreign
            self.most_bytes = max(self.most_bytes, self._held)
            self.most_calls = max(self.most_calls, self._calls)
        try:
            yield
        finally:
            with self._lock:
                self._held -= foreign
                self._calls -= 1

    @staticmethod
    def _place(buffer: Buffer) -> tuple[int, int]:
        address = int(np.frombuffer(buffer, np.uint8).ctypes.data)
        return address, address + buffer.nbytes

    def _is_own(self, place: tuple[int, int]) -> bool:
        return any(begin <= place[0] < end for begin, end in self._own)

    def memory(self) -> int:
        """Bytes of all memory that was ever used beside the tensors'."""
        total = reach = 0
        for begin, end in sorted(self._places):
            total += max(end - max(begin, reach), 0)
            reach = max(end, reach)
        return total

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        with self._on_their_way([item.buffer for item in ranges]):
            self.inner.read(name, ranges)

    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        with self._on_their_way(buffers):
            file.write(buffers, offset)


def strided(count: int) -> dict[str, torch.Tensor]:
    """Tensors whose bytes lie nowhere in a row: 6 MiB each."""
    return {f"t{i}": torch.randn(2048, 768).T for i in range(count)}


@pytest.mark.parametrize(
    ("budget", "threads"),
    [(INFLIGHT_PER_THREAD // 4, 1), (INFLIGHT_PER_THREAD, 1), (2 * INFLIGHT_PER_THREAD, 2)],
)
def test_many_threads_keep_to_the_budget(tmp_path: Path, budget: int, threads: int) -> None:
    state = strided(12)
    watched = Watched(FileSystemStore(tmp_path, sync=False), list(state.values()))
    options = {"thread_count": 8, "max_inflight_bytes": budget}
    writer = ShardedWriter(lambda _: watched, "x", **options)
    dcp_engine.save(state, storage_writer=writer, no_dist=True)
    assert watched.foreign_bytes > sum(tensor.nbytes for tensor in state.values())
    assert watched.most_calls <= threads
    assert watched.most_bytes <= threads * INFLIGHT_PER_THREAD

    target = {name: torch.zeros(2048, 768).T for name in state}
    watched = Watched(FileSystemStore(tmp_path), list(target.values()))
    reader = ShardedReader(lambda _: watched, "x", **options)
    dcp_engine.load(target, storage_reader=reader, no_dist=True)
    assert watched.most_calls <= threads
    assert watched.most_bytes <= threads * INFLIGHT_PER_THREAD
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("block_size", [64 << 10, 4 << 20, 64 << 20])
@pytest.mark.parametrize("slow", [False, True])
def test_blocks_of_any_size_fit_into_the_budget(
    tmp_path: Path, block_size: int, slow: bool
) -> None:
    state = {
        "rows": torch.arange(3 << 20, dtype=torch.int32).view(3 << 10, 1 << 10),
        "columns": torch.randn(10 << 10, 1 << 10),
    }
    dcp_engine.save(
        state,
        storage_writer=ShardedWriter(
            lambda _: FileSystemStore(tmp_path, sync=False), "x", block_size=block_size
        ),
        no_dist=True,
    )
    target = {
        "rows": torch.zeros(3 << 10, 1 << 10, dtype=torch.int32),
        "columns": torch.zeros(1 << 10, 10 << 10).T,
    }
    watched = Watched(FileSystemStore(tmp_path), list(target.values()))
    if slow:  # then there are two threads a request
        watched.preferred_read = 8 << 20
    reader = ShardedReader(
        lambda _: watched, "x", thread_count=8, max_inflight_bytes=INFLIGHT_PER_THREAD
    )
    dcp_engine.load(target, storage_reader=reader, no_dist=True)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    assert watched.memory() <= INFLIGHT_PER_THREAD
    assert watched.most_calls == 1


def test_contiguous_tensors_need_next_to_nothing(tmp_path: Path) -> None:
    state = {f"t{i}": torch.randn(1 << 20) for i in range(6)}
    watched = Watched(FileSystemStore(tmp_path, sync=False), list(state.values()))
    writer = ShardedWriter(lambda _: watched, "x", thread_count=3)
    dcp_engine.save(state, storage_writer=writer, no_dist=True)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    loading = Watched(FileSystemStore(tmp_path), list(target.values()))
    reader = ShardedReader(lambda _: loading, "x", thread_count=3)
    dcp_engine.load(target, storage_reader=reader, no_dist=True)
    for store in (watched, loading):
        assert store.foreign_bytes < 64 << 10  # header, digests, manifest


def test_a_copy_is_gone_before_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what a thread copies in order to write it."""
    held: list[int] = []

    def watched(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
        slices = contiguous_slices(tensor, limit)
        copies: list[weakref.ref[torch.Tensor]] = []
        while (part := next(slices, None)) is not None:
            held.append(sum(copy() is not None for copy in copies))
            copies.append(weakref.ref(part))
            yield part
            del part

    monkeypatch.setattr(write_files, "contiguous_slices", watched)
    monkeypatch.setattr(write_files, "COPY_BYTES", 1 << 12)
    state = {"w": torch.arange(100 * 100.0).reshape(100, 100).t()}
    dcp_engine.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    assert len(held) == 10
    assert set(held) == {0}
