"""Saves by a worker process under the recorder: nothing of them is missed, and what would be wrong
about them is found."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dcp_engine.native_storage import CommitRecord
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.open_manifest import read_manifest
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.crash import Recorder, RecordError, jobs
from storage_backends.testing.crash.killed_saves import moments
from storage_backends.testing.crash.operations import Mark, Record, Step
from storage_backends.testing.crash.other_process import (
    StepLog,
    WatchedWriter,
    record_of_worker,
)
from storage_backends.testing.crash.persistence import Bounds
from storage_backends.testing.crash.runs import record_of, save_new, save_old
from storage_backends.testing.crash.scenarios import SCENARIOS, Budget

FIELDS = ("directory", "name", "node", "to_directory", "to_name", "offset", "size")


def kinds_of(record: Record) -> list[tuple[object, ...]]:
    """What was done to what, but for the names and bytes that differ from save to save."""

    def plain(value: object) -> object:
        if not isinstance(value, str):
            return value
        return re.sub("[0-9a-f]{32}", "", value)

    return [
        (
            type(step.operation).__name__,
            *(plain(getattr(step.operation, name, None)) for name in FIELDS),
        )
        for step in record.steps
        if not isinstance(step.operation, Mark)
    ]


def save_by_worker(writer: WatchedWriter, recorder: Recorder) -> None:
    with jobs.worker_saver(writer) as start:
        start(jobs.content("new")).result(60.0)
        recorder.mark("returned:new")


def test_a_worker_does_what_a_save_does() -> None:
    """The same operations on the same files in the same order, sizes and places included."""
    by_worker = record_of_worker(save_old, save_by_worker)
    assert kinds_of(by_worker) == kinds_of(record_of(save_old, save_new))
    assert by_worker.steps[-1].operation == Mark("returned:new"), "all was done before"


def test_what_the_other_process_writes_itself_is_refused() -> None:
    def run(writer: WatchedWriter, recorder: Recorder) -> None:
        jobs.save_alone(Path(recorder.root), "new")

    with pytest.raises(RecordError, match="no operation of the worker"):
        record_of_worker(save_old, run)


def test_a_log_keeps_the_order_of_its_writers(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log")
    assert log.steps() == ()
    steps = tuple(Step(Mark(str(n)), "a") for n in range(3))
    for step in steps:
        StepLog(tmp_path / "log")(step)
    assert log.steps() == steps


def unsynced(self: ShardedWriter, checkpoint_id: str | None, save_id: str) -> CommitRecord | None:
    """What looks whether a save was committed, and does not make that durable."""
    with FileSystemStore(str(self._checkpoint_id)) as store:
        record = read_manifest(store)[1]
    return record if record.save_id == save_id else None


def test_a_commit_that_is_believed_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker dies between the rename and its ``fsync``; its parent sees the manifest."""
    monkeypatch.setattr(ShardedWriter, "find_commit", unsynced)
    budget = replace(Budget(), bounds=Bounds(exhaustive=2, pairs=0, random=0))
    found = SCENARIOS["worker_dies"](budget).violations
    assert {violation.found for violation in found} == {"old"}
    assert all("returned:new" in violation.marks for violation in found)


def test_the_most_delicate_moment_is_among_all() -> None:
    (delicate,) = moments(None)
    assert delicate in moments(6)
    assert set(moments(6)) < set(moments(1))
