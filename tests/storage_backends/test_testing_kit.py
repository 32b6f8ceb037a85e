"""The kit's doubles do what they say, and nothing else."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.futures import Future

from dcp_engine.default_planner import DefaultLoadPlanner
from dcp_engine.errors import StorageError
from dcp_engine.metadata import Metadata
from dcp_engine.plan import LoadPlan, SavePlan
from dcp_engine.storage import ReadRange, StorageReader
from storage_backends import testing
from storage_backends.filesystem import FileSystemReader, FileSystemWriter
from storage_backends.memory import MemoryStore
from storage_backends.testing.faulty import (
    Delay,
    Fail,
    Fault,
    FaultyByteStore,
    FlipBit,
    Hang,
    LoseReply,
    ShortWrite,
    StaleListing,
    TornWrite,
    disk_full,
)
from storage_backends.testing.faulty_calls import (
    CallFault,
    FaultyColumnarReader,
    FaultyColumnarWriter,
    FaultyStorageReader,
    FaultyStorageWriter,
    faulty_reader,
    faulty_writer,
)
from storage_backends.testing.recording import RecordingByteStore
from tests.storage_backends.hand_plans import load_whole, save, whole
from tests.storage_backends.test_item_face import HandSavePlanner

STATE = {"w": torch.arange(10.0)}


def fresh() -> MemoryStore:
    store = MemoryStore()
    store.make_directory("")
    return store


def write(store: FaultyByteStore, name: str, *parts: bytes) -> None:
    file = store.create(name)
    file.write([memoryview(part) for part in parts], 0)
    file.close()


def test_which_call_fails() -> None:
    error = OSError("bad")
    fault = Fault(operation="put", name="b*", nth=2, times=2, action=Fail(error))
    store = FaultyByteStore(fresh(), [fault])
    outcomes = []
    for name in ("a", "b1", "b2", "b3", "b4", "a"):
        try:
            store.put(name, b"")
        except OSError as caught:
            assert caught is error
            outcomes.append(name)
    assert outcomes == ["b2", "b3"]
    assert [name for _, name in store.fired] == ["b2", "b3"]
    store.add(Fault(operation="*", action=Fail(error), times=None))
    for call in (lambda: store.size("a"), lambda: list(store.list()), lambda: store.create("z")):
        with pytest.raises(OSError):
            call()


def test_bytes_that_go_wrong() -> None:
    inner = fresh()
    faults = [
        Fault(operation="write", name="short", action=ShortWrite(3)),
        Fault(operation="write", name="torn", action=TornWrite(3, OSError("torn"))),
        Fault(operation="write", name="flip", action=FlipBit(9)),
        Fault(operation="put", name="put", action=FlipBit(0)),
        Fault(operation="put", name="lost", action=LoseReply(OSError("lost"))),
        Fault(operation="read", name="whole", action=FlipBit(17)),
    ]
    store = FaultyByteStore(inner, faults)
    write(store, "short", b"ab", b"cd")
    assert inner.get("short") == b"abc"
    with pytest.raises(OSError, match="torn"):
        write(store, "torn", b"ab", b"cd")
    assert inner.get("torn") == b"abc"
    write(store, "flip", b"\0\0", b"\0")
    assert inner.get("flip") == b"\0\2\0"
    store.put("put", b"\0")
    assert inner.get("put") == b"\1"
    with pytest.raises(OSError, match="lost"):
        store.put("lost", b"x")
    assert inner.get("lost") == b"x"
    inner.put("whole", b"\0\0\0")
    parts = [bytearray(2), bytearray(1)]
    ranges = [ReadRange(0, memoryview(parts[0])), ReadRange(2, memoryview(parts[1]))]
    store.read("whole", ranges)
    assert parts == [b"\0\0", b"\2"]
    store.read("whole", ranges)
    assert parts == [b"\0\0", b"\0"]


def test_capacity() -> None:
    inner = fresh()
    store = FaultyByteStore(inner, capacity=5)
    store.put("a", b"123")
    with pytest.raises(StorageError) as caught:
        write(store, "b", b"45", b"67")
    assert (caught.value.kind, caught.value.errno) == ("disk_full", errno.ENOSPC)
    assert inner.get("b") == b"45"
    with pytest.raises(StorageError):
        store.put("c", b"1")


def test_hang() -> None:
    entered, released = threading.Event(), threading.Event()
    inner = fresh()
    store = FaultyByteStore(
        inner, [Fault(operation="put", action=Hang(released, entered), name="x")]
    )
    thread = threading.Thread(target=store.put, args=("x", b"1"))
    thread.start()
    assert entered.wait(60)
    assert list(inner.list()) == []
    released.set()
    thread.join(60)
    assert inner.get("x") == b"1"


def test_delay() -> None:
    slept: list[float] = []
    fault = Fault(operation="*", name="x", action=Delay(0.25, slept.append), times=2)
    store = FaultyByteStore(fresh(), [fault])
    store.put("y", b"1")
    assert slept == []
    store.put("x", b"1")
    assert (slept, store.get("x")) == ([0.25, 0.25], b"1")


def test_a_stale_listing() -> None:
    inner = fresh()
    inner.put("a1", b"1")
    inner.put("a2", b"22")
    store = FaultyByteStore(inner)
    store.add(Fault(operation="list", name="a*", action=StaleListing(), nth=2))
    inner.delete(["a1"])
    inner.put("a3", b"333")
    now, then = {"a2": 2, "a3": 3}, {"a1": 1, "a2": 2}
    for prefix, wanted in (("a", now), ("", now), ("a", then), ("a", now)):
        assert {file.name: file.size for file in store.list(prefix)} == wanted


def test_faults_of_chosen_ranks() -> None:
    fault = Fault(operation="put", action=Fail(disk_full()), ranks=frozenset({1, 3}))
    for rank in range(4):
        store = FaultyByteStore(fresh(), [fault], rank=rank)
        if rank in (1, 3):
            with pytest.raises(OSError) as caught:
                store.put("f", b"")
            assert caught.value.errno == errno.ENOSPC
        else:
            store.put("f", b"")


def test_an_action_without_meaning_is_an_error_of_the_test() -> None:
    store = FaultyByteStore(fresh(), [Fault(operation="size", action=FlipBit(0))])
    with pytest.raises(TypeError):
        store.size("x")


def test_recording() -> None:
    store = RecordingByteStore(fresh())
    buffer = bytearray(b"abc")
    file = store.create("f")
    file.write([memoryview(buffer), memoryview(b"de")], 4)
    file.sync()
    file.close()
    with pytest.raises(FileNotFoundError):
        store.size("missing")
    assert store.operations() == [
        ("create", "f"),
        ("write", "f"),
        ("sync", "f"),
        ("close", "f"),
        ("size", "missing"),
    ]
    written = store.calls[1]
    assert (written.offset, written.nbytes, written.buffers) == (4, 5, 2)
    assert store.calls[-1].failed == "FileNotFoundError"
    assert (store.count("write"), store.nbytes("write")) == (1, 5)
    store.clear()
    assert store.calls == []


def test_calls_of_a_columnar_writer_and_reader(tmp_path: Path) -> None:
    error = RuntimeError("injected")
    for method in ("observe", "begin_save", "write_columns", "commit_columns"):
        writer = faulty_writer(
            FileSystemWriter(tmp_path / method), [CallFault(method=method, error=error)]
        )
        assert isinstance(writer, FaultyColumnarWriter)
        assert writer.takes_columns
        with pytest.raises(RuntimeError, match="injected"):
            save([writer], whole(STATE), "a" * 32)
        assert [fault.method for fault in writer.schedule.fired] == [method]
        writer.abort_save()
    elsewhere = CallFault(method="write_columns", error=error, ranks=frozenset({1}))
    writer = faulty_writer(FileSystemWriter(tmp_path / "c"), [elsewhere], rank=0)
    assert isinstance(writer, FaultyColumnarWriter)
    save([writer], whole(STATE), "a" * 32)
    second = CallFault(method="read_columns", error=error, nth=2, when="after")
    reader = faulty_reader(FileSystemReader(tmp_path / "c"), [second])
    assert isinstance(reader, FaultyColumnarReader)
    assert torch.equal(load_whole(reader, STATE)["w"], STATE["w"])
    with pytest.raises(RuntimeError, match="injected"):
        load_whole(reader, STATE)


def test_failing_in_the_future(tmp_path: Path) -> None:
    error = RuntimeError("injected")
    writer = faulty_writer(
        FileSystemWriter(tmp_path), [CallFault(method="write_data", error=error, when="future")]
    )
    planner = HandSavePlanner(dict(STATE))
    writer.reset()
    writer.set_up_storage_writer(True, rank=0)
    plans, _ = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    assert isinstance(plan, SavePlan)
    future = writer.write_data(plan, planner)
    with pytest.raises(RuntimeError, match="injected"):
        future.wait()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


class Lines(StorageReader):
    """Writes down which of its methods were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def reset(self, checkpoint_id: Any = None) -> None:
        self.calls.append("reset")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.calls.append("read_metadata")
        return Metadata({})

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("set_up_storage_reader")

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        self.calls.append("read_data")
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def test_the_nth_call_of_any_method() -> None:
    inner = Lines()
    error = RuntimeError("injected")
    reader = FaultyStorageReader(inner, [CallFault(method="*", error=error, nth=3)])
    reader.reset()
    reader.read_metadata()
    with pytest.raises(RuntimeError, match="injected"):
        reader.set_up_storage_reader(Metadata({}), True)
    reader.set_up_storage_reader(Metadata({}), True)
    assert inner.calls == ["reset", "read_metadata", "set_up_storage_reader"]


def test_a_slow_call() -> None:
    inner = Lines()
    slept: list[float] = []
    fault = CallFault(method="reset", delay=0.25, sleep=slept.append)
    reader = FaultyStorageReader(inner, [fault])
    reader.reset()
    reader.reset()
    assert (slept, inner.calls) == ([0.25], ["reset", "reset"])


@pytest.mark.parametrize("error", [None, RuntimeError("injected")])
def test_a_future_that_hangs(error: RuntimeError | None) -> None:
    entered, released = threading.Event(), threading.Event()
    fault = CallFault(method="read_data", error=error, when="future", hang=Hang(released, entered))
    inner = Lines()
    future = FaultyStorageReader(inner, [fault]).read_data(LoadPlan([]), DefaultLoadPlanner())
    assert entered.wait(60)
    assert not future.done()
    assert inner.calls == ["read_data"]
    released.set()
    if error is None:
        assert future.wait() is None
    else:
        with pytest.raises(RuntimeError, match="injected"):
            future.wait()


def test_a_call_that_hangs() -> None:
    entered, released = threading.Event(), threading.Event()
    inner = Lines()
    fault = CallFault(method="reset", hang=Hang(released, entered), ranks=frozenset({2}))
    reader = FaultyStorageReader(inner, [fault], rank=2)
    thread = threading.Thread(target=reader.reset)
    thread.start()
    assert entered.wait(60)
    assert inner.calls == []
    released.set()
    thread.join(60)
    assert inner.calls == ["reset"]


def test_every_call_of_a_writer_goes_through() -> None:
    """Also those that only a failure makes."""
    error = RuntimeError("injected")
    for method in ("abort", "leave_in_doubt", "reset", "storage_meta"):
        writer = faulty_writer(FileSystemWriter("never"), [CallFault(method=method, error=error)])
        plain = FaultyStorageWriter(FileSystemWriter("never"), [CallFault(method="*", error=error)])
        for double in (writer, plain):
            with pytest.raises(RuntimeError, match="injected"):
                getattr(double, method)()


def test_the_kit_is_found_in_one_place() -> None:
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    with pytest.raises(AttributeError, match="NoSuchThing"):
        testing.NoSuchThing  # noqa: B018
