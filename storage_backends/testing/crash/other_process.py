"""Recording what a worker process does below a directory, with the marks of the process that waits
for it.

Both append to one log: each step when it is done and before its process goes on. So the log has
the order of things; and since what is in it has to explain the directory in the end, nothing is
missed that either did there.

Belongs here: the log, and the writer that takes the recorder along to the worker. Does not belong
here: which saves are recorded (``async_saves``).
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.crash import jobs
from storage_backends.testing.crash.explorer import scratch_directory
from storage_backends.testing.crash.interception import intercepting
from storage_backends.testing.crash.operations import Mark, Record, Step, Sync
from storage_backends.testing.crash.recorder import Recorder, RecordError, require_explained

__all__ = ["Assignment", "StepLog", "WatchedWriter", "record_of_worker"]

_SEED = 1
"""Of what the worker draws; its parent draws with another."""


@dataclass(frozen=True)
class StepLog:
    """A file of steps, to which any process appends."""

    path: Path

    def __call__(self, step: Step) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, pickle.dumps(step))
        finally:
            os.close(descriptor)

    def steps(self) -> tuple[Step, ...]:
        """All so far, in the order in which they were done."""
        found: list[Step] = []
        if self.path.exists():
            with self.path.open("rb") as stream:
                size = self.path.stat().st_size
                while stream.tell() < size:
                    found.append(pickle.load(stream))
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What the worker is to record, and where it dies."""

    root: Path
    log: StepLog
    killed_at: int | None = None
    """Before so manieth of its operations; None: it lives."""


class WatchedWriter(ShardedWriter):
    """The engine's writer; unpickled in another process, it starts to record what that does."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__(FileSystemStore, assignment.root / jobs.CHECKPOINT, thread_count=1)
        self._assignment = assignment
        self._home = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if os.getpid() != self._home:
            _record_from_now_on(self._assignment)


@cache
def _record_from_now_on(assignment: Assignment) -> object:
    """For the rest of the life of this process."""
    held = jobs.frozen(_SEED)
    held.__enter__()
    fault = None if assignment.killed_at is None else _Kill(assignment.killed_at)
    recorder = Recorder(assignment.root, tell=assignment.log, fault=fault)
    watching = intercepting(recorder)
    watching.__enter__()
    return held, watching


class _Kill:
    """A fault that no program survives."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    def __call__(self, kind: str) -> OSError | None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        return None


def record_of_worker(
    prepare: Callable[[Path], None],
    run: Callable[[WatchedWriter, Recorder], None],
    *,
    killed_at: int | None = None,
) -> Record:
    """What a worker does while ``run``, after ``prepare``, saves by the writer that it is given.
    The recorder is this process's: for marks, and for the ``fsync`` of what was there before.
    Raises ``RecordError`` if this process does more than that."""
    with scratch_directory() as root, scratch_directory() as aside, jobs.frozen():
        prepare(root)
        log = StepLog(aside / "steps")
        here = Recorder(root, tell=log)
        with intercepting(here):
            run(WatchedWriter(Assignment(root=root, log=log, killed_at=killed_at)), here)
        # Both have numbered in one order what was there before, and nothing else.
        for step in here.record().steps:
            if not isinstance(step.operation, Mark | Sync):
                raise RecordError(f"{step.operation} is no operation of the worker")
        record = replace(here.record(), steps=log.steps())
        require_explained(record, root)
        return record
