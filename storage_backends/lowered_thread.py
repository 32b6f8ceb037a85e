"""A call on a thread that gives way to the other threads of this process.

Belongs here: that thread. Does not belong here: what it does, and whether it should.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["run_lowered"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def run_lowered(fn: Callable[[], _T], nice: int) -> _T:
    """Call ``fn`` on a thread whose nice value is higher than the caller's by ``nice``, and return
    what it returns, or raise what it raises.

    A thread of its own, for this call: a nice value can be raised by everybody and lowered by
    nobody, and passes on to the threads that are started from it, which therefore should end with
    the call. Only Linux has a nice value per thread; elsewhere, and where no thread can be
    started, the caller makes the call itself.
    """
    if sys.platform != "linux":
        return fn()
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _lower(nice)
            results.append(fn())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="dcp_engine-lowered", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends
        return fn()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _lower(nice: int) -> None:
    thread = threading.get_native_id()
    try:
        # Linux takes a thread's number here; values above the highest one mean that one.
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)
    except OSError as error:
        logger.debug("the thread keeps its nice value: %s", error)
