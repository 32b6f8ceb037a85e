"""Saves that go on while training does, in a thread of the same process.

Belongs here: scenarios of ``async_save``. Does not belong here: its process executor, whose file
operations are those of another process (it runs the same writer).
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcp_engine.errors import CheckpointException
from storage_backends.testing.crash import jobs, rules
from storage_backends.testing.crash.explorer import Report
from storage_backends.testing.crash.recorder import Recorder
from storage_backends.testing.crash.runs import Budget, explorer_of, record_of, save_old

__all__ = ["async_overwrites"]


def async_overwrites(budget: Budget) -> Report:
    """Two saves, one behind the other; the state changes as soon as each is staged."""

    def run(root: Path, recorder: Recorder) -> None:
        with jobs.async_saver(root) as start:
            futures = []
            for label in ("new", "other"):
                state = jobs.content(label)
                future = start(state)
                future.add_done_callback(partial(_mark_end, recorder, label))
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.fill_(7.0)
                futures.append(future)
            for future in futures:
                future.result(60.0)

    explorer = explorer_of(
        "async, two overwrites", rules.one_after_another(["old", "new", "other"]), budget
    )
    explorer.explore(record_of(save_old, run))
    return explorer.report()


def _mark_end(recorder: Recorder, label: str, done: Future[Any]) -> None:
    error = done.exception()
    if error is None:
        recorder.mark(f"returned:{label}")
        return
    doubt = isinstance(error, CheckpointException) and error.kind == "commit_in_doubt"
    recorder.mark(f"doubt:{label}" if doubt else f"failed:{label}")
