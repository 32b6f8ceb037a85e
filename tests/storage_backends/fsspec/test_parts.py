"""Files in parts: bounded memory, order, failures; and requests that read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcp_engine as dcp
from dcp_engine.errors import StorageError, UsageError
from dcp_engine.storage import ReadRange
from storage_backends.fsspec import FsspecWriter, open_fsspec_store
from storage_backends.fsspec_parts import s3_part_bytes
from storage_backends.fsspec_reads import ShortRead, plan_requests
from storage_backends.fsspec_writes import PartsFile
from storage_backends.testing.contracts.fixtures import in_parallel
from tests.servers.s3 import S3Server
from tests.storage_backends.fsspec.states import state


class Sink:
    """Keeps parts, and lets a test hold them up."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.parts: dict[int, tuple[int, bytes]] = {}
        self.whole: bytes | None = None
        self.size: int | None = None
        self.failing: int | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.under_way = 0
        self.most_under_way = 0
        self.changed = threading.Condition()

    def put_whole(self, data: bytes) -> None:
        self.calls.append("put_whole")
        self.whole = data

    def begin(self) -> None:
        self.calls.append("begin")

    def send(self, number: int, offset: int, data: bytes) -> None:
        with self.changed:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            self.changed.notify_all()
        self.go_on.wait(30)
        with self.changed:
            self.under_way -= 1
            self.changed.notify_all()
        if number == self.failing:
            raise OSError("this part does not get through")
        self.parts[number] = (offset, data)

    def wait_until_under_way(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.under_way == count, 30)

    def finish(self, size: int) -> None:
        self.calls.append("finish")
        self.size = size

    def discard(self) -> None:
        self.calls.append("discard")

    def content(self) -> bytes:
        content = b""
        for number, (offset, data) in sorted(self.parts.items()):
            assert offset == len(content), number
            content += data
        return content


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as running:
        yield running


def once(action: str, call: Callable[[], Any]) -> Any:
    return call()


def opened(sink: Sink, pool: ThreadPoolExecutor, *, slots: int = 3) -> PartsFile:
    return PartsFile("x://", "f", sink, part_bytes=10, slots=slots, pool=pool, guard=once)


def views(data: bytes, step: int) -> list[memoryview]:
    return [memoryview(data)[at : at + step] for at in range(0, len(data), step)]


@pytest.mark.parametrize("step", [1, 3, 10, 11, 95])
@pytest.mark.parametrize("nbytes", [0, 1, 9, 10, 11, 20, 95])
def test_parts_make_up_the_file(pool: ThreadPoolExecutor, nbytes: int, step: int) -> None:
    data = bytes(range(nbytes))
    sink = Sink()
    file = opened(sink, pool)
    at = 0
    for view in views(data, step):
        file.write([view], at)
        at += view.nbytes
    file.close()
    if nbytes <= 10:
        assert (sink.whole, sink.calls) == (data, ["put_whole"])
    else:
        assert sink.content() == data
        assert sink.size == nbytes
        assert sink.calls == ["begin", "finish"]


def test_no_more_than_the_slots_are_held(pool: ThreadPoolExecutor) -> None:
    """A writer that is faster than the medium waits, and memory stays bounded."""
    sink = Sink()
    sink.go_on.clear()
    file = opened(sink, pool, slots=3)
    data = bytes(100)
    taken: list[int] = []

    def write() -> None:
        for at in range(0, 100, 5):
            file.write([memoryview(data)[at : at + 5]], at)
            taken.append(at + 5)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    sink.wait_until_under_way(3)
    # Three parts on their way, one full; the write that needs a fifth waits.
    writer.join(0.1)
    assert writer.is_alive()
    assert taken[-1] <= 40
    sink.go_on.set()
    writer.join(30)
    file.close()
    assert sink.most_under_way == 3
    assert sink.content() == data


def test_a_part_that_fails_stops_the_file(pool: ThreadPoolExecutor) -> None:
    sink = Sink()
    sink.failing = 1
    file = opened(sink, pool)
    with pytest.raises(OSError, match="does not get through"):
        file.write([memoryview(bytes(100))], 0)
        file.close()
    file.abort()
    assert "finish" not in sink.calls
    assert sink.calls[-1] == "discard"


def test_abort_waits_for_what_is_on_its_way(pool: ThreadPoolExecutor) -> None:
    """A part that arrives after the clean-up would stay for ever."""
    sink = Sink()
    sink.go_on.clear()
    file = opened(sink, pool)
    file.write([memoryview(bytes(25))], 0)
    sink.wait_until_under_way(2)
    giving_up = threading.Thread(target=file.abort, daemon=True)
    giving_up.start()
    giving_up.join(0.05)
    assert "discard" not in sink.calls
    sink.go_on.set()
    giving_up.join(30)
    assert sink.under_way == 0
    assert sink.calls == ["begin", "discard"]
    with pytest.raises(StorageError, match="closed"):
        file.write([memoryview(b"x")], 25)


def test_s3_takes_so_many_parts_and_no_more() -> None:
    assert s3_part_bytes(None, 16 << 20) == 16 << 20
    assert s3_part_bytes(1 << 30, 16 << 20) == 16 << 20
    terabytes = 5 << 40
    assert -(-terabytes // s3_part_bytes(terabytes, 16 << 20)) <= 10_000


def test_uploads_at_a_time_are_bounded_by_memory(s3: S3Server) -> None:
    """80 MiB may be held: 32 by the thread that digests, and of parts 48: 9 with the one that
    fills."""
    bucket = s3.new_bucket()
    url = f"s3://{bucket}/run"
    writer = FsspecWriter(url, part_bytes=5 << 20, max_inflight_bytes=80 << 20, **s3.options)
    s3.tell()
    dcp.save(state(numel=16_000_000), storage_writer=writer)
    parts = [entry for entry in s3.log() if "partNumber" in entry["query"]]
    assert len(parts) == 13
    assert 1 < s3.most_at_once() <= 8


@pytest.mark.parametrize(
    "options",
    [{"streams": 0}, {"part_bytes": -1}, {"request_bytes": "much"}, {"retries": -1}],
)
def test_limits_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        open_fsspec_store("memory://x", **options)


# Requests that read


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 90)), max_size=12),
    st.integers(1, 120),
    st.integers(0, 40),
)
def test_requests_bring_all_ranges(
    wanted: list[tuple[int, int]], request_bytes: int, max_gap: int
) -> None:
    data = bytes(n % 251 for n in range(500))
    buffers = [bytearray(nbytes) for _, nbytes in wanted]
    ranges = [
        ReadRange(offset, memoryview(buffer))
        for (offset, _), buffer in zip(wanted, buffers, strict=True)
    ]
    requests = plan_requests(ranges, request_bytes=request_bytes, max_gap=max_gap)
    covered = sum(request.end - request.begin for request in requests)
    useful = {at for offset, nbytes in wanted for at in range(offset, offset + nbytes)}
    assert covered <= len(useful) + max_gap * len(wanted) + sum(n for _, n in wanted)
    for request in requests:
        assert 0 < request.end - request.begin <= request_bytes
        request.deliver(data[request.begin : request.end])
    for (offset, nbytes), buffer in zip(wanted, buffers, strict=True):
        assert bytes(buffer) == data[offset : offset + nbytes]


def test_neighbours_share_a_request_and_strangers_do_not() -> None:
    memory = [memoryview(bytearray(10)) for _ in range(4)]
    offsets = [0, 10, 25, 100]
    ranges = [ReadRange(offset, view) for offset, view in zip(offsets, memory, strict=True)]
    found = plan_requests(ranges, request_bytes=1000, max_gap=5)
    assert [(request.begin, request.end) for request in found] == [(0, 35), (100, 110)]


def test_a_short_answer_is_not_taken() -> None:
    view = memoryview(bytearray(10))
    (request,) = plan_requests([ReadRange(5, view)], request_bytes=100, max_gap=0)
    with pytest.raises(ShortRead, match="byte 9"):
        request.deliver(b"abc")
    assert bytes(view) == bytes(10)


def test_reads_of_several_threads_share_the_streams(s3: S3Server) -> None:
    url = f"s3://{s3.new_bucket()}/run"
    data = bytes(range(256)) * 4096
    with open_fsspec_store(url, streams=3, request_bytes=64 << 10, **s3.options) as store:
        store.put("f", data)
        s3.tell()
        found = [bytearray(len(data)) for _ in range(4)]
        in_parallel(4, lambda n: store.read("f", [ReadRange(0, memoryview(found[n]))]))
    assert all(bytes(each) == data for each in found)
    assert len(s3.log()) == 4 * 16
    assert s3.most_at_once() <= 3
