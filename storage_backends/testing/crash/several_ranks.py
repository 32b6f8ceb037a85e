"""Ranks that save together, and a coordinator that dies.

Belongs here: scenarios of one job of several ranks that agree. Does not belong here: savers that
know nothing of each other (``several_savers``).
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from dcp_engine.coordination.interface import Deadlines
from dcp_engine.errors import CheckpointException
from dcp_engine.storage import ByteStore
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.testing.crash import jobs, rules
from storage_backends.testing.crash.explorer import Report
from storage_backends.testing.crash.operations import Record
from storage_backends.testing.crash.recorder import Recorder
from storage_backends.testing.crash.runs import Budget, explorer_of, marked, nothing, record_of
from storage_backends.testing.crash.turns import interleavings
from storage_backends.testing.wrapping import WrappingByteStore

__all__ = ["coordinator_dies", "one_rank_fails", "two_ranks_first", "two_ranks_overwrite"]

T = TypeVar("T")


def _ranks(prepare: Callable[[Path], None]) -> Record:
    def run(root: Path, recorder: Recorder) -> None:
        def on_rank(rank: int, work: Callable[[], None]) -> None:
            work()
            recorder.mark("returned:new")

        jobs.save_together(root, "new", mark=recorder.mark, on_rank=on_rank)

    return record_of(prepare, run)


def _old_of_ranks(root: Path) -> None:
    jobs.save_together(root, "old", mark=lambda text: None)


def two_ranks_first(budget: Budget) -> Report:
    """Two ranks, nothing there before."""
    explorer = explorer_of(
        "two ranks, first save",
        rules.one_save(jobs.NONE, "new"),
        budget,
        partial(jobs.read, ranks=True),
    )
    record = _ranks(nothing)
    explorer.explore(record, interleavings(record.steps, budget.orders, budget.seed))
    return explorer.report()


def two_ranks_overwrite(budget: Budget) -> Report:
    """Two ranks over a checkpoint of two ranks, in several orders."""
    explorer = explorer_of(
        "two ranks, overwrite",
        rules.one_save("old", "new"),
        budget,
        partial(jobs.read, ranks=True),
    )
    record = _ranks(_old_of_ranks)
    explorer.explore(record, interleavings(record.steps, budget.orders, budget.seed))
    return explorer.report()


class _RankFails:
    """A fault: the ``nth`` operation of one rank fails, and all later ones work."""

    def __init__(self, rank: int, nth: int, tell: Callable[[str], None]) -> None:
        self._thread = f"rank-{rank}"
        self._left = nth
        self._tell = tell

    def __call__(self, kind: str) -> OSError | None:
        if threading.current_thread().name != self._thread:
            return None
        self._left -= 1
        if self._left:
            return None
        self._tell("signal:gave-up")
        return OSError(errno.EIO, os.strerror(errno.EIO))


def one_rank_fails(budget: Budget) -> Report:
    """Two ranks over a checkpoint; an operation of one of them fails, both tidy up and raise."""
    explorer = explorer_of(
        "two ranks, one of them fails",
        rules.one_save("old", "new"),
        budget,
        partial(jobs.read, ranks=True),
    )
    generator = random.Random(f"{budget.seed} failing")
    for number in range(budget.orders):
        rank, nth = number % 2, generator.randrange(1, 9)
        record = record_of(_old_of_ranks, partial(_fail, rank=rank, nth=nth))
        explorer.explore(record, interleavings(record.steps, 2, budget.seed))
    return explorer.report()


def _fail(root: Path, recorder: Recorder, *, rank: int, nth: int) -> None:
    def on_rank(number: int, work: Callable[[], None]) -> None:
        with marked(recorder, "new"):
            work()

    recorder.set_fault(_RankFails(rank, nth, recorder.mark))
    jobs.save_together(root, "new", mark=recorder.mark, on_rank=on_rank)


class _Freezing(WrappingByteStore):
    """Stops the coordinator for good at one call of its commit."""

    def __init__(self, path: Path, due: tuple[str, str, bool], freeze: Callable[[], None]) -> None:
        super().__init__(FileSystemStore(path))
        self._due = due
        self._freeze = freeze

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        due, suffix, after = self._due
        met = operation == due and name.endswith(suffix)
        if met and not after:
            self._freeze()
        result = call()
        if met and after:
            self._freeze()
        return result


class _Dead(BaseException):
    """The end of a thread that stands for a killed process."""


_DEATHS = {
    "before the manifest": ("create", "manifest.json.tmp", False),
    "before the rename": ("replace", "manifest.json", False),
    "after the rename": ("replace", "manifest.json", True),
}


def coordinator_dies(budget: Budget) -> Report:
    """Two ranks; the coordinator wins the decision to commit and dies: before the manifest, before
    or after the rename. The other rank cannot know, and deletes nothing."""
    explorer = explorer_of(
        "coordinator dies after deciding",
        rules.one_save("old", "new"),
        budget,
        partial(jobs.read, ranks=True),
    )
    for due in _DEATHS.values():
        record = record_of(_old_of_ranks, partial(_die, due=due))
        explorer.explore(
            record, interleavings(record.steps, max(budget.orders // 3, 1), budget.seed)
        )
    return explorer.report()


def _die(root: Path, recorder: Recorder, *, due: tuple[str, str, bool]) -> None:
    told = threading.Event()

    def freeze() -> None:
        told.wait(60.0)
        recorder.refuse(threading.current_thread().name)
        raise _Dead

    def store(path: Path, rank: int) -> ByteStore:
        return _Freezing(path, due, freeze) if rank == 0 else FileSystemStore(path)

    def on_rank(rank: int, work: Callable[[], None]) -> None:
        try:
            if rank == 0:
                work()
            else:
                with marked(recorder, "new"):
                    work()
        except (_Dead, CheckpointException):
            if rank != 0:
                raise
        finally:
            told.set()

    jobs.save_together(
        root,
        "new",
        mark=recorder.mark,
        deadlines=Deadlines(timeout=1.0, stall_timeout=30.0),
        store=store,
        on_rank=on_rank,
    )
