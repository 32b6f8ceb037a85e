"""Writers and readers that fail in a chosen method on chosen ranks, in the call or its future.

Belongs here: the schedule (``CallFault``) and the four doubles. Does not belong here: faults of a
medium (``faulty``).

Each double wraps the real thing and passes every call on. The columnar ones have the column face
as well, so that a saver treats them like the engine's own; ``faulty_writer`` and ``faulty_reader``
pick by what they wrap.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch.futures import Future

from dcp_engine.format.manifest import Manifest, StoredObject
from dcp_engine.format.object_codec import EncodedObject
from dcp_engine.metadata import Metadata, StorageMeta
from dcp_engine.native_storage import (
    ColumnarReader,
    ColumnarWriter,
    CommitRecord,
    RankReport,
    SaveTicket,
)
from dcp_engine.plan import LoadPlan, SavePlan
from dcp_engine.planner import LoadPlanner, SavePlanner
from dcp_engine.planning.columns import GlobalPlan, LoadColumns, RankAssignment
from dcp_engine.storage import Check, StorageReader, StorageWriter, WriteResult
from storage_backends.testing.faulty import Hang

__all__ = [
    "CallFault",
    "FaultyColumnarReader",
    "FaultyColumnarWriter",
    "FaultyStorageReader",
    "FaultyStorageWriter",
    "faulty_reader",
    "faulty_writer",
]


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CallFault:
    """What happens in ``method`` on ``ranks`` (None: all of them).

    First a wait, if ``delay`` (seconds) or ``hang`` says so, then ``error`` is raised, if there is
    one. ``method`` is a name or ``"*"``; ``nth``: in which of the calls that match, 1 is the first.

    ``when``: ``"before"`` the real call, ``"after"`` it, or in the ``"future"`` that it returns
    (``write_data`` and ``read_data``; the real call is made first). A method that returns no
    future does it at once.
    """

    method: str
    error: BaseException | None = None
    ranks: frozenset[int] | None = None
    when: Literal["before", "after", "future"] = "before"
    nth: int = 1
    hang: Hang | None = None
    delay: float = 0.0
    sleep: Callable[[float], None] = time.sleep

    def happen(self) -> None:
        """Wait and raise."""
        if self.delay:
            self.sleep(self.delay)
        if self.hang is not None:
            if self.hang.entered is not None:
                self.hang.entered.set()
            self.hang.released.wait()
        if self.error is not None:
            raise self.error


class _Schedule:
    """Counts the calls that match each fault, and makes what is due happen."""

    def __init__(self, faults: Sequence[CallFault], rank: int) -> None:
        self._faults = [f for f in faults if f.ranks is None or rank in f.ranks]
        self._seen = [0] * len(self._faults)
        self._lock = threading.Lock()
        self.fired: list[CallFault] = []

    def enter(self, method: str) -> CallFault | None:
        """Count the call; what is due before it happens now, what is due later is returned."""
        due = None
        with self._lock:
            for at, fault in enumerate(self._faults):
                if fault.method in ("*", method):
                    self._seen[at] += 1
                    if self._seen[at] == fault.nth and due is None:
                        due = fault
            if due is not None:
                self.fired.append(due)
        if due is not None and due.when == "before":
            due.happen()
            return None
        return due

    def call(self, method: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """``target.method(*args, **kwargs)``, failing when it is due."""
        later = self.enter(method)
        result = getattr(target, method)(*args, **kwargs)
        if later is None:
            return result
        if later.when == "future" and isinstance(result, Future):
            return _later(later, result)
        later.happen()
        return result


def _later(fault: CallFault, real: Future[Any]) -> Future[Any]:
    """A future that waits or fails as ``fault`` says, once ``real`` is done."""
    result = real.wait()
    future: Future[Any] = Future()

    def complete() -> None:
        try:
            fault.happen()
        except BaseException as error:  # whatever the test wants to see raised
            future.set_exception(error)
        else:
            future.set_result(result)

    if fault.hang is None:
        complete()
    else:
        # A daemon: a test that never releases it must not keep the process.
        threading.Thread(target=complete, name="dcp_engine-hang", daemon=True).start()
    return future


class FaultyStorageWriter(StorageWriter):
    """Wraps any ``StorageWriter``. ``rank`` is this process's rank."""

    def __init__(self, inner: StorageWriter, faults: Sequence[CallFault], *, rank: int = 0) -> None:
        self.inner = inner
        self.schedule = _Schedule(faults, rank)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.schedule.call("reset", self.inner, checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.schedule.call("set_up_storage_writer", self.inner, is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return _as(SavePlan, self.schedule.call("prepare_local_plan", self.inner, plan))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return _as(list, self.schedule.call("prepare_global_plan", self.inner, plans))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = self.schedule.call(
            "write_data", self.inner, plan, planner
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.schedule.call("finish", self.inner, metadata, results)

    def abort(self) -> None:
        self.schedule.call("abort", self.inner)

    def leave_in_doubt(self) -> None:
        self.schedule.call("leave_in_doubt", self.inner)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        meta: StorageMeta | None = self.schedule.call("storage_meta", self.inner)
        return meta


class FaultyColumnarWriter(FaultyStorageWriter, ColumnarWriter):
    """Wraps a ``ColumnarWriter``, both faces."""

    inner: ColumnarWriter

    def __init__(
        self, inner: ColumnarWriter, faults: Sequence[CallFault], *, rank: int = 0
    ) -> None:
        super().__init__(inner, faults, rank=rank)

    @property
    def takes_columns(self) -> bool:
        return self.inner.takes_columns

    @property
    def checkpoint(self) -> str:
        return self.inner.checkpoint

    def announce(self, ticket: SaveTicket) -> None:
        self.schedule.call("announce", self.inner, ticket)

    def observe(self, checkpoint_id: str | os.PathLike[str] | None) -> str | None:
        observed: str | None = self.schedule.call("observe", self.inner, checkpoint_id)
        return observed

    def begin_save(self, checkpoint_id: str | os.PathLike[str] | None, ticket: SaveTicket) -> None:
        self.schedule.call("begin_save", self.inner, checkpoint_id, ticket)

    def write_columns(
        self,
        assignment: RankAssignment,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        tensors: Sequence[torch.Tensor],
        objects: Mapping[str, EncodedObject],
        inline: frozenset[str],
        check: Check,
    ) -> RankReport:
        return _as(
            RankReport,
            self.schedule.call(
                "write_columns",
                self.inner,
                assignment,
                names,
                shapes,
                tensors,
                objects,
                inline,
                check,
            ),
        )

    def commit_columns(
        self, plan: GlobalPlan, reports: Sequence[RankReport], observed: str | None
    ) -> CommitRecord:
        return _as(
            CommitRecord,
            self.schedule.call("commit_columns", self.inner, plan, reports, observed),
        )

    def manifest_source(self, record: CommitRecord) -> Callable[[], Manifest]:
        source: Callable[[], Manifest] = self.schedule.call("manifest_source", self.inner, record)
        return source

    def remove_replaced(self) -> None:
        self.schedule.call("remove_replaced", self.inner)

    def end_save(self) -> None:
        self.schedule.call("end_save", self.inner)

    def abort_save(self) -> None:
        self.schedule.call("abort_save", self.inner)


class FaultyStorageReader(StorageReader):
    """Wraps any ``StorageReader``. ``rank`` is this process's rank."""

    def __init__(self, inner: StorageReader, faults: Sequence[CallFault], *, rank: int = 0) -> None:
        self.inner = inner
        self.schedule = _Schedule(faults, rank)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.schedule.call("reset", self.inner, checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _as(Metadata, self.schedule.call("read_metadata", self.inner, *args, **kwargs))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.schedule.call(
            "set_up_storage_reader", self.inner, metadata, is_coordinator, *args, **kwargs
        )

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return _as(LoadPlan, self.schedule.call("prepare_local_plan", self.inner, plan))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return _as(list, self.schedule.call("prepare_global_plan", self.inner, plans))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        future: Future[None] = self.schedule.call("read_data", self.inner, plan, planner)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class FaultyColumnarReader(FaultyStorageReader, ColumnarReader):
    """Wraps a ``ColumnarReader``, both faces."""

    inner: ColumnarReader

    def __init__(
        self, inner: ColumnarReader, faults: Sequence[CallFault], *, rank: int = 0
    ) -> None:
        super().__init__(inner, faults, rank=rank)

    @property
    def takes_columns(self) -> bool:
        return self.inner.takes_columns

    @property
    def checkpoint(self) -> str:
        return self.inner.checkpoint

    def expect_ranks(self, world_size: int) -> None:
        self.schedule.call("expect_ranks", self.inner, world_size)

    def open_checkpoint(
        self,
        checkpoint_id: str | os.PathLike[str] | None,
        expected: CommitRecord | None = None,
    ) -> tuple[Manifest, CommitRecord]:
        opened: tuple[Manifest, CommitRecord] = self.schedule.call(
            "open_checkpoint", self.inner, checkpoint_id, expected
        )
        return opened

    def manifest_bytes(self, record: CommitRecord) -> bytes:
        return _as(bytes, self.schedule.call("manifest_bytes", self.inner, record))

    def adopt_manifest(
        self, checkpoint_id: str | os.PathLike[str] | None, data: bytes, record: CommitRecord
    ) -> Manifest:
        return _as(
            Manifest,
            self.schedule.call("adopt_manifest", self.inner, checkpoint_id, data, record),
        )

    def read_columns(
        self,
        manifest: Manifest,
        plan: LoadColumns,
        tensors: Sequence[torch.Tensor],
        check: Check,
    ) -> int:
        return _as(
            int, self.schedule.call("read_columns", self.inner, manifest, plan, tensors, check)
        )

    def local_data_file(self, manifest: Manifest, row: int) -> str | None:
        path: str | None = self.schedule.call("local_data_file", self.inner, manifest, row)
        return path

    def read_object(self, manifest: Manifest, stored: StoredObject) -> bytes:
        return _as(bytes, self.schedule.call("read_object", self.inner, manifest, stored))

    def block_digests(self, manifest: Manifest, file: int, start: int) -> bytes:
        return _as(bytes, self.schedule.call("block_digests", self.inner, manifest, file, start))

    def read_extra(self, manifest: Manifest, name: str) -> bytes:
        return _as(bytes, self.schedule.call("read_extra", self.inner, manifest, name))

    def verify_files(self, manifest: Manifest, *, max_bytes: int) -> int:
        return _as(
            int, self.schedule.call("verify_files", self.inner, manifest, max_bytes=max_bytes)
        )

    def close_checkpoint(self) -> None:
        self.schedule.call("close_checkpoint", self.inner)


def faulty_writer(
    inner: StorageWriter, faults: Sequence[CallFault], *, rank: int = 0
) -> FaultyStorageWriter:
    """The double that has the faces of ``inner``."""
    if isinstance(inner, ColumnarWriter):
        return FaultyColumnarWriter(inner, faults, rank=rank)
    return FaultyStorageWriter(inner, faults, rank=rank)


def faulty_reader(
    inner: StorageReader, faults: Sequence[CallFault], *, rank: int = 0
) -> FaultyStorageReader:
    """The double that has the faces of ``inner``."""
    if isinstance(inner, ColumnarReader):
        return FaultyColumnarReader(inner, faults, rank=rank)
    return FaultyStorageReader(inner, faults, rank=rank)


def _as(kind: type[T], value: object) -> T:
    """``value``, which the wrapped object returned, checked for what the interface promises."""
    if not isinstance(value, kind):
        raise TypeError(f"the wrapped object returned {type(value).__name__}, not {kind.__name__}")
    return value
