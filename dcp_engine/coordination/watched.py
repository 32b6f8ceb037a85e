"""A call that may never return, on a thread that may be left behind.

Belongs here: nothing but that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from dcp_engine.coordination.limits import LOOK
from dcp_engine.errors import CoordinationError

__all__ = ["run_watched"]

_Result = TypeVar("_Result")


def run_watched(
    call: Callable[[], _Result],
    limit: float,
    location: str,
    look: Callable[[], float] = lambda: LOOK,
) -> _Result:
    """Run ``call`` on a thread of its own, so that signals are seen meanwhile.

    Args:
        look: called again and again meanwhile; returns the seconds until the next time.

    Raises:
        CoordinationError: kind ``store_lost``, if it has not returned within ``limit`` seconds or
            could not connect. Anything else that ``call`` raises.
    """
    done: Future[_Result] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="dcp_engine-watched", daemon=True).start()
    deadline = time.monotonic() + limit
    while not wait([done], timeout=min(look(), max(deadline - time.monotonic(), 0.0))).done:
        if time.monotonic() >= deadline:
            raise CoordinationError(
                f"the store at {location} does not answer within {limit:.3g} s", kind="store_lost"
            )
    return done.result()
