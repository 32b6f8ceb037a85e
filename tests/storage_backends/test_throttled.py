"""The throttled store, and that a load over it has as many streams at work as it may."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import dcp_engine as dcp
from dcp_engine.storage import ReadRange
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.memory import MemoryStore
from storage_backends.sharded_reader import INFLIGHT_PER_THREAD, ShardedReader
from storage_backends.testing import RecordingByteStore, ThrottledByteStore, WrappingByteStore

STREAMS = 4


class FakeTime:
    """Passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 9))
        self.now += seconds


def ranges(*places: tuple[int, int]) -> list[ReadRange]:
    return [ReadRange(offset, memoryview(bytearray(length))) for offset, length in places]


def test_requests_take_time() -> None:
    time = FakeTime()
    store = ThrottledByteStore(
        MemoryStore(), latency=0.5, bandwidth=100, clock=time.clock, sleep=time.sleep
    )
    store.make_directory("")
    store.put("f", bytes(1000))
    file = store.create("g")
    file.write([memoryview(bytes(30)), memoryview(bytes(20))], 0)
    file.close()
    assert time.slept == [0.5, 0.5, 10, 0.5, 0.5, 0.5, 0.5]
    time.slept.clear()
    store.read("f", ranges((0, 100), (100, 100), (500, 50), (600, 10), (10, 0)))
    assert time.slept == [0.5, 2.0, 0.5, 0.5, 0.5, 0.1, 0.5]
    time.slept.clear()
    store.delete(["f", "g"])
    assert list(store.list()) == []
    assert time.slept == [0.5, 0.5]
    assert store.requests == 11
    assert store.peak_streams == 1
    assert store.local_path("f") is None


@pytest.mark.parametrize(("takes", "slept"), [(0.4, [0.5, 0.6]), (3.0, [0.5])])
def test_time_that_the_medium_takes_counts(takes: float, slept: list[float]) -> None:
    time = FakeTime()
    inner = MemoryStore()
    inner.make_directory("")
    inner.put("f", bytes(100))

    class Slow(WrappingByteStore):
        def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
            time.now += takes
            self.inner.read(name, ranges)

    store = ThrottledByteStore(
        Slow(inner), latency=0.5, bandwidth=100, clock=time.clock, sleep=time.sleep
    )
    store.read("f", ranges((0, 100)))
    assert time.slept == slept


def test_no_more_streams_than_allowed() -> None:
    inner = MemoryStore()
    inner.make_directory("")
    inner.put("f", b"abc")
    both_in = threading.Barrier(2)
    store = ThrottledByteStore(
        inner, latency=1, streams=2, clock=lambda: 0.0, sleep=lambda _: both_in.wait(60) and None
    )
    threads = [threading.Thread(target=store.size, args=("f",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (store.requests, store.peak_streams) == (6, 2)


def test_what_a_reader_should_ask_for() -> None:
    store = ThrottledByteStore(MemoryStore(), latency=0.02, bandwidth=100e6)
    assert store.preferred_read == 38_000_000
    assert ThrottledByteStore(MemoryStore()).preferred_read == MemoryStore.preferred_read


@pytest.mark.parametrize("by_items", [False, True])
def test_a_load_has_all_streams_at_work(tmp_path: Path, by_items: bool) -> None:
    """Evenly: each of four threads makes one request, large and small tensors together."""
    mib = 1 << 18  # elements of four bytes
    state = {f"w{i}": torch.arange(float(2 * mib)) + i for i in range(5)}
    state |= {f"norm{i}": torch.arange(100.0) + i for i in range(50)}
    state |= {"odd": torch.arange(5.0 * mib), "last": torch.arange(float(3 * mib + 17))}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    all_in = threading.Barrier(STREAMS)

    def sleep(seconds: float) -> None:
        if seconds > 1:  # a request of more than a mebibyte
            all_in.wait(60)

    log = RecordingByteStore(FileSystemStore(tmp_path / "c"))
    store = ThrottledByteStore(
        log, bandwidth=1 << 20, preferred_read=5 << 20, clock=lambda: 0.0, sleep=sleep
    )
    reader = ShardedReader(
        lambda _: store,
        "c",
        thread_count=STREAMS,
        max_inflight_bytes=STREAMS * INFLIGHT_PER_THREAD,
    )
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    planner = _Planner() if by_items else None
    dcp.load(target, storage_reader=reader, planner=planner, no_dist=True)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    assert store.peak_streams == STREAMS
    data = [c for c in log.calls if c.operation == "read" and c.name.endswith(".safetensors")]
    sizes = sorted(call.nbytes for call in data)
    assert len(sizes) == 1 + STREAMS  # the header, and one each
    assert sizes[-1] - sizes[1] < 256 << 10
    assert sum(sizes[1:]) == sum(tensor.nbytes for tensor in state.values())


class _Planner(dcp.DefaultLoadPlanner):
    """The default one, by items."""

    def commit_tensor(self, read_item: dcp.ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(read_item, tensor)


def test_many_small_tensors_come_in_few_requests(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((64,), float(i)) for i in range(3000)}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    store = ThrottledByteStore(
        FileSystemStore(tmp_path / "c"), preferred_read=8 << 20, sleep=lambda _: None
    )
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    reader = ShardedReader(lambda _: store, "c", thread_count=STREAMS)
    dcp.load(target, storage_reader=reader, no_dist=True)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    # The manifest, sizes, digests, header, and all tensors at once.
    assert store.requests <= 8
