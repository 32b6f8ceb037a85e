"""Saves that go on while training does: in a thread of the same process, or in a worker process.

Belongs here: scenarios of ``async_save``, and of the worker's death. Does not belong here: how the
worker's operations come into the record (``other_process``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcp_engine.errors import CheckpointException
from storage_backends.testing.crash import jobs, rules
from storage_backends.testing.crash.explorer import Report
from storage_backends.testing.crash.killed_saves import moments
from storage_backends.testing.crash.other_process import WatchedWriter, record_of_worker
from storage_backends.testing.crash.recorder import Recorder
from storage_backends.testing.crash.runs import (
    Budget,
    explorer_of,
    nothing,
    record_of,
    save_old,
)

__all__ = ["async_by_worker", "async_overwrites", "worker_dies"]

_LIMIT = 60.0


def async_overwrites(budget: Budget) -> Report:
    """Two saves, one behind the other; the state changes as soon as each is staged."""

    def run(root: Path, recorder: Recorder) -> None:
        with jobs.async_saver(root) as start:
            _save_all(start, recorder, ["new", "other"])

    explorer = explorer_of(
        "async, two overwrites", rules.one_after_another(["old", "new", "other"]), budget
    )
    explorer.explore(record_of(save_old, run))
    return explorer.report()


def async_by_worker(budget: Budget) -> Report:
    """The same by a worker process, the first of them where nothing is there."""

    def run(writer: WatchedWriter, recorder: Recorder) -> None:
        with jobs.worker_saver(writer) as start:
            _save_all(start, recorder, ["new", "other"])

    explorer = explorer_of(
        "async by a worker",
        rules.one_after_another([jobs.NONE, "new", "other"]),
        budget,
    )
    explorer.explore(record_of_worker(nothing, run))
    return explorer.report()


def worker_dies(budget: Budget) -> Report:
    """An overwrite whose worker is killed before one of its operations; the process that waits
    for it goes on, and says what became of it."""

    def run(writer: WatchedWriter, recorder: Recorder) -> None:
        with jobs.worker_saver(writer) as start:
            _save_all(start, recorder, ["new"], may_fail=True)

    explorer = explorer_of("async, the worker is killed", rules.one_save("old", "new"), budget)
    for nth in moments(1 if budget.all_deaths else None):
        explorer.explore(record_of_worker(save_old, run, killed_at=nth))
    return explorer.report()


def _save_all(
    start: Callable[[dict[str, Any]], Future[Any]],
    recorder: Recorder,
    labels: Sequence[str],
    *,
    may_fail: bool = False,
) -> None:
    futures = []
    for label in labels:
        state = jobs.content(label)
        future = start(state)
        future.add_done_callback(partial(_mark_end, recorder, label))
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.fill_(7.0)
        futures.append(future)
    for future in futures:
        error = future.exception(_LIMIT)
        if error is not None and not (may_fail and isinstance(error, CheckpointException)):
            raise error


def _mark_end(recorder: Recorder, label: str, done: Future[Any]) -> None:
    error = done.exception()
    if error is None:
        recorder.mark(f"returned:{label}")
        return
    doubt = isinstance(error, CheckpointException) and error.kind == "commit_in_doubt"
    recorder.mark(f"doubt:{label}" if doubt else f"failed:{label}")
