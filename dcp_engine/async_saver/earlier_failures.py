"""Failures of earlier saves that nobody looked at.

Belongs here: which one comes up next, and what the other ranks hear when one does. Does not belong
here: when they come up (``saver``).

A failure comes up at a call, on the ranks whose futures hold it. The save of that call then lacks
these ranks and fails on the others too. If that failure came up at a call in its turn, the ranks
would go on failing each other's saves for ever; so it has a kind of its own, and is only logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from dcp_engine.async_saver.response import AsyncSaveResponse
from dcp_engine.errors import CheckpointError, CheckpointException, CoordinationError

__all__ = ["log_consequences", "next_unseen", "told_to_others"]

logger = logging.getLogger(__name__)

_KIND = "earlier_save_failed"


def next_unseen(responses: Iterable[AsyncSaveResponse]) -> BaseException | None:
    """A failure that nobody has looked at; once."""
    for response in responses:
        error = response.unseen_failure()
        if error is not None:
            response.mark_seen()
            error.add_note("an earlier asynchronous save failed, and nobody looked at it")
            return error
    return None


def log_consequences(responses: Iterable[AsyncSaveResponse]) -> None:
    """Of the failures that nobody has looked at, log those of saves that failed because other
    ranks raised what an earlier one had failed with. They do not come up any more."""
    for response in responses:
        error = response.unseen_failure()
        if error is not None and _is_consequence(error):
            response.mark_seen()
            logger.error("an asynchronous save failed, and nobody looked at it", exc_info=error)


def told_to_others(earlier: BaseException) -> CoordinationError:
    """Why this rank does not take part in a save at whose call it raises ``earlier``."""
    text = earlier.message if isinstance(earlier, CheckpointError) else repr(earlier)
    return CoordinationError(
        "instead of beginning this save the rank raised what an earlier one had failed with, and "
        f"nobody had looked at: {text}",
        kind=_KIND,
        hint="save again; look at the result of every save",
    )


def _is_consequence(error: BaseException) -> bool:
    """Whether all failed ranks had raised an earlier failure."""
    if not isinstance(error, CheckpointException) or not error.failures:
        return False
    causes = [cause for cause, _ in error.failures.values()]
    return all(isinstance(cause, CheckpointError) and cause.kind == _KIND for cause in causes)
