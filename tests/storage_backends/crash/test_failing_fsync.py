"""An ``fsync`` that fails once: the system may have dropped the pages, so nobody may try again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dcp_engine.errors import CheckpointException
from storage_backends.testing.crash import Recorder, recording
from storage_backends.testing.crash.jobs import frozen, read, save_alone
from storage_backends.testing.crash.operations import Create, Sync, SyncFailed

SYNCS = 14
"""Of one overwrite, while everything works."""


class NthSyncFails:
    def __init__(self, nth: int) -> None:
        self._left = nth

    def __call__(self, kind: str) -> OSError | None:
        if kind == "sync":
            self._left -= 1
            if self._left == 0:
                return OSError(errno.EIO, "the disk is broken")
        return None


@pytest.mark.parametrize("nth", range(1, SYNCS + 2))
def test_an_fsync_that_fails_once(tmp_path: Path, nth: int) -> None:
    with frozen():
        save_alone(tmp_path, "old")
    recorder = Recorder(tmp_path, fault=NthSyncFails(nth))
    kind = None
    with recording(recorder), frozen(1):
        try:
            save_alone(tmp_path, "new")
        except CheckpointException as error:
            kind = error.kind
            assert "could not make" in str(error) or "nput/output error" in str(error)
    operations = [step.operation for step in recorder.record().steps]
    failed = [op.node for op in operations if isinstance(op, SyncFailed)]
    assert len(failed) == (nth <= SYNCS)
    if not failed:
        assert kind is None and read(tmp_path) == "new"
        return
    # Before the rename the old checkpoint counts; after it, nobody can know after a power failure.
    assert (kind, read(tmp_path)) in [("io_error", "old"), ("commit_in_doubt", "new")]
    files = {op.node for op in operations if isinstance(op, Create)}
    after = operations[operations.index(SyncFailed(failed[0])) + 1 :]
    if failed[0] in files:
        assert Sync(failed[0]) not in after, "the same file is synced again"
    save_alone(tmp_path, "next")
    assert read(tmp_path) == "next"
