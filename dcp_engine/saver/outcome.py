"""How a save ends: committed, aborted, or in doubt. Decided once, by all ranks alike.

The coordinator must win the decision key before it touches the manifest; a rank that gives up
must win it before it deletes anything. What is left after that is one question: when the decision
was ``commit`` and the save failed all the same, is it proved that the manifest was not replaced?
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from dcp_engine.coordination.interface import Operation
from dcp_engine.errors import (
    CheckpointError,
    CheckpointException,
    ConflictError,
    CoordinationError,
)

__all__ = ["commit_once", "settle_failure"]

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
        raise ConflictError(
            f"the commit ended with {type(error).__name__}: {error}",
            kind="commit_in_doubt",
            hint="nothing was deleted; the next save, load or prune decides by the manifest",
        ) from error


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
        failures = error.failures if isinstance(error, CheckpointException) else {}
        raise CheckpointException(
            f"whether save {operation.number} was committed is not known: {error}",
            failures,
            kind="commit_in_doubt",
            checkpoint=checkpoint,
            hint="nothing was deleted; the next save, load or prune decides by the manifest",
        ) from error
    _tidy(abort, checkpoint)


def _tidy(action: Callable[[], None], checkpoint: str) -> None:
    try:
        action()
    except Exception:
        # The save has failed already and its cause matters more; what remains is garbage that
        # owner.json identifies, and the next save or prune removes it.
        logger.exception("could not tidy up after the failed save to %s", checkpoint)


def _in_doubt(operation: Operation, error: BaseException) -> bool:
    if isinstance(error, CheckpointError) and error.kind == "commit_in_doubt":
        return True
    try:
        if operation.decide_once("abort") == "abort":
            return False
    except CheckpointError:
        return True
    return not _proved_uncommitted(operation, error)


def _proved_uncommitted(operation: Operation, error: BaseException) -> bool:
    """The decision was ``commit``; did the coordinator itself say that it replaced nothing?"""
    if not isinstance(error, CheckpointException):
        return False
    failure = error.failures.get(operation.coordinator_rank)
    if failure is None:
        return False
    cause = failure[0]
    return isinstance(cause, CheckpointError) and not isinstance(cause, CoordinationError)
