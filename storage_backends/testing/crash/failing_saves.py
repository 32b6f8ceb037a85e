"""Saves in which operations fail, and which then are crashed.

Belongs here: faults at the level of the operating system. Does not belong here: faults of ranks
(``several_ranks``).
"""

from __future__ import annotations

import errno
import os

from storage_backends.testing.crash import jobs, rules
from storage_backends.testing.crash.explorer import Report
from storage_backends.testing.crash.runs import (
    Budget,
    explorer_of,
    nothing,
    operations_of,
    record_of,
    save_new,
    save_old,
)

__all__ = ["failing_first_save", "failing_for_good", "failing_once"]


class _NthFails:
    """A fault: the ``nth`` operation fails, once or (``stays``) with all that follow. A write
    finds the disk full, anything else is an error of the medium."""

    def __init__(self, nth: int, *, stays: bool) -> None:
        self._nth = nth
        self._stays = stays
        self._count = 0

    def __call__(self, kind: str) -> OSError | None:
        self._count += 1
        if self._count == self._nth or (self._stays and self._count > self._nth):
            number = errno.ENOSPC if kind == "write" else errno.EIO
            return OSError(number, os.strerror(number))
        return None


def _failing(name: str, budget: Budget, *, stays: bool) -> Report:
    explorer = explorer_of(name, rules.one_save("old", "new"), budget)
    for nth in range(1, len(operations_of(save_old, save_new)) + 1, budget.every):
        explorer.explore(record_of(save_old, save_new, fault=_NthFails(nth, stays=stays)))
    return explorer.report()


def failing_once(budget: Budget) -> Report:
    """One operation of an overwrite fails, ``fsync`` among them; the save cleans up, or is in
    doubt, or (while it cleans up after the commit) succeeds all the same."""
    return _failing("overwrite, one operation fails", budget, stays=False)


def failing_for_good(budget: Budget) -> Report:
    """From one operation on all fail: not even the clean-up works."""
    return _failing("overwrite, the medium fails", budget, stays=True)


def failing_first_save(budget: Budget) -> Report:
    """The same where nothing was there."""
    explorer = explorer_of(
        "first save, one operation fails", rules.one_save(jobs.NONE, "new"), budget
    )
    for nth in range(1, len(operations_of(nothing, save_new)) + 1, budget.every):
        explorer.explore(record_of(nothing, save_new, fault=_NthFails(nth, stays=False)))
    return explorer.report()
