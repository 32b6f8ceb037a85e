"""A collective of the workers that broke because one of them died.

Belongs here: telling that from a failure of this rank's own. Does not belong here: what else may
fail in a save (``saver.outcome``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from dcp_engine.errors import CheckpointError

__all__ = ["heeding_a_lost_worker"]

_WORD_TAKES = 3.0
"""Seconds for another rank's failure to be heard of here."""
_LOOK = 0.02
_Result = TypeVar("_Result")


def heeding_a_lost_worker(call: Callable[[], _Result], check: Callable[[], None]) -> _Result:
    """``call()``. If a connection of gloo broke in it, as a rule because a worker of another rank
    died, then that one's is the failure to tell of: its parent says so, and the word takes a
    moment. Without it, what ``call`` raised is raised.

    Args:
        check: raises as soon as another rank has failed.
    """
    try:
        return call()
    except BaseException as error:
        if not _is_broken_connection(error):
            raise
        deadline = time.monotonic() + _WORD_TAKES
        while time.monotonic() < deadline:
            check()
            time.sleep(_LOOK)
        raise


def _is_broken_connection(error: BaseException) -> bool:
    """Gloo has no types of errors; all of them name their place in its sources."""
    cause = error.__cause__ if isinstance(error, CheckpointError) else error
    return isinstance(cause, RuntimeError) and "gloo" in str(cause).lower()
