"""How a save ends: committed, aborted, or in doubt. Decided once, by all ranks alike.

The coordinator must win the decision key before it touches the manifest; a rank that gives up
must win it before it deletes anything. What is left after that is one question: when the decision
was ``commit`` and the save failed all the same, is it proved that the manifest was not replaced?
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from dcp_engine.coordination.failures import raised_by_exit
from dcp_engine.coordination.interface import Operation
from dcp_engine.errors import (
    CheckpointError,
    CheckpointException,
    ConflictError,
    CoordinationError,
)

__all__ = [
    "commit_once",
    "finish_commit",
    "heeding_the_first_failure",
    "proved_uncommitted",
    "settle_failure",
]

_WORD_TAKES = 3.0
"""Seconds for another rank's failure to be heard of here."""
_LOOK = 0.02
logger = logging.getLogger(__name__)
T = TypeVar("T")


def commit_once(operation: Operation, commit: Callable[[], T]) -> T:
    """On the coordinator: win the decision, then commit.

    An error from ``commit`` that is a ``CheckpointError`` other than ``commit_in_doubt`` proves
    that nothing was replaced; anything else leaves the save in doubt.
    """
    if operation.decide_once("commit") != "commit":
        raise CoordinationError(
            "another rank gave the save up before it could be committed", kind="interrupted"
        )
    try:
        return commit()
    except CheckpointError:
        raise
    except BaseException as error:
        if raised_by_exit(error):
            raise  # as it is; the others take it for a doubt all the same
        raise ConflictError(
            f"the commit ended with {type(error).__name__}: {error}",
            kind="commit_in_doubt",
            hint="nothing was deleted; the next save, load or prune decides by the manifest",
        ) from error


@contextmanager
def heeding_the_first_failure(operation: Operation) -> Iterator[None]:
    """Around this rank's writing: a data directory that vanishes under it was removed, as a rule,
    by a rank that failed and waits for nobody, and whose failure is the one to tell of. It says so
    before it removes anything; the word takes a moment."""
    try:
        yield
    except ConflictError as error:
        if operation.world_size == 1 or not isinstance(error.__cause__, FileNotFoundError):
            raise
        deadline = time.monotonic() + _WORD_TAKES
        while time.monotonic() < deadline:
            operation.check()
            time.sleep(_LOOK)
        raise


def settle_failure(
    operation: Operation,
    error: BaseException,
    *,
    abort: Callable[[], None],
    leave_in_doubt: Callable[[], None],
    reported: bool,
    checkpoint: str,
) -> None:
    """After a failed save: ``abort`` removes what was written if it is provably not committed.

    ``reported``: whether this rank has said that it wrote its part. Without that nobody commits.

    Raises ``CheckpointException(kind="commit_in_doubt")`` when that cannot be known, in which
    case nothing is deleted. Returns otherwise; the caller raises ``error`` on.
    """
    if reported and _in_doubt(operation, error):
        _tidy(leave_in_doubt, checkpoint)
        if isinstance(error, CheckpointException) and error.kind == "commit_in_doubt":
            return
        if raised_by_exit(error):
            error.add_note(f"whether save {operation.number} was committed is not known")
            return
        failures = error.failures if isinstance(error, CheckpointException) else {}
        raise CheckpointException(
            f"whether save {operation.number} was committed is not known: {error}",
            failures,
            kind="commit_in_doubt",
            checkpoint=checkpoint,
            hint="nothing was deleted; the next save, load or prune decides by the manifest",
        ) from error
    _tidy(abort, checkpoint)


def finish_commit(actions: Sequence[Callable[[], None]], *, checkpoint: str) -> None:
    """After a save that all ranks know to be committed: what is left to do on this one. Failing
    to is no failed save; it is logged."""
    with ExitStack() as all_of_them:
        for action in reversed(actions):
            all_of_them.callback(_tidy, action, checkpoint, "committed")


def _tidy(action: Callable[[], None], checkpoint: str, outcome: str = "failed") -> None:
    try:
        action()
    except BaseException as error:
        if raised_by_exit(error):
            raise
        # How the save ended is known and matters more; what remains is garbage that owner.json
        # identifies, and the next save or prune removes it.
        logger.exception("could not tidy up after the %s save to %s", outcome, checkpoint)


def _in_doubt(operation: Operation, error: BaseException) -> bool:
    if isinstance(error, CheckpointError) and error.kind == "commit_in_doubt":
        return True
    try:
        if operation.decide_once("abort") == "abort":
            return False
    except CheckpointError:
        return True
    return not proved_uncommitted(error, operation.coordinator_rank)


def proved_uncommitted(error: BaseException, coordinator_rank: int) -> bool:
    """The decision was ``commit``; did the coordinator itself say that it replaced nothing?"""
    if not isinstance(error, CheckpointException):
        return False
    failure = error.failures.get(coordinator_rank)
    if failure is None:
        return False
    cause = failure[0]
    return isinstance(cause, CheckpointError) and not isinstance(cause, CoordinationError)
