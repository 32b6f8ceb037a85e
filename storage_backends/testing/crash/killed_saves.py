"""Saves that are killed while the machine runs on, and what is done there before its power fails.

What a killed save did is seen by all that comes after it, and need not be durable for that. Whoever
deletes on the strength of what it sees has to make that durable first.

Belongs here: one program that dies, and one that goes on. Does not belong here: a machine that
starts again (``single_saves.crash_after_crash``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dcp_engine.errors import CheckpointException
from storage_backends.prune import prune
from storage_backends.testing.crash import jobs, rules
from storage_backends.testing.crash.explorer import Report
from storage_backends.testing.crash.recorder import DeadThread, Recorder
from storage_backends.testing.crash.runs import (
    Budget,
    explorer_of,
    operations_of,
    record_of,
    save_new,
    save_old,
)

__all__ = ["killed_then_next_save", "killed_then_prune", "moments"]

_VICTIM = "killed"
Continuation = Callable[[Path, Recorder], None]


class _DiesAt:
    """A fault: the thread that saves is dead from its ``nth`` operation on."""

    def __init__(self, nth: int, recorder: Recorder) -> None:
        self._left = nth
        self._recorder = recorder

    def __call__(self, kind: str) -> OSError | None:
        if threading.current_thread().name != _VICTIM:
            return None
        self._left -= 1
        if self._left:
            return None
        self._recorder.refuse(_VICTIM)
        return DeadThread("it is killed")


def _killed(root: Path, recorder: Recorder, *, nth: int, then: Continuation) -> None:
    recorder.set_fault(_DiesAt(nth, recorder))

    def save() -> None:
        try:
            jobs.save_alone(root, "new")
        except CheckpointException:
            return  # nobody hears what the dead say

    thread = threading.Thread(target=save, name=_VICTIM)
    thread.start()
    thread.join()
    then(root, recorder)


def _explored(name: str, labels: list[str], then: Continuation, budget: Budget) -> Report:
    explorer = explorer_of(name, rules.one_after_another(labels), budget)
    for nth in moments(budget.every_kill):
        explorer.explore(record_of(save_old, partial(_killed, nth=nth, then=then)))
    return explorer.report()


def moments(every: int | None) -> list[int]:
    """Before the how-manieth operations to kill an overwrite: each ``every``-th, the one behind
    the last, and in any case the most delicate one, when the manifest has its name, but not
    durably."""
    kinds = operations_of(save_old, save_new)
    # The owner record takes its name by a rename, too; the manifest comes last.
    renamed = len(kinds) - kinds[::-1].index("rename")
    others = [] if every is None else range(1, len(kinds) + 2, every)
    return sorted({*others, renamed + 1})


def killed_then_prune(budget: Budget) -> Report:
    """``prune`` right after a save was killed: before each of its operations, in turn."""

    def then(root: Path, recorder: Recorder) -> None:
        prune(root, older_than=-1.0)

    return _explored("killed, prune, power fails", ["old", "new"], then, budget)


def killed_then_next_save(budget: Budget) -> Report:
    """The next save of the same job, which prunes too."""

    def then(root: Path, recorder: Recorder) -> None:
        save_new(root, recorder, label="other")
        prune(root, older_than=-1.0)

    return _explored("killed, next save, power fails", ["old", "new", "other"], then, budget)
