"""Being called when the main thread is over, and everything else still works.

Belongs here: that call. Does not belong here: what is done then.

``atexit`` comes too late for work that is to be finished: by then ``concurrent.futures`` takes
nothing more, in this process, and with it whatever storage libraries do by its threads.
"""

from __future__ import annotations

# Its own call of this kind ends all executors. It is made after those that were asked for later.
import concurrent.futures.thread  # noqa: F401
import threading
import weakref
from collections.abc import Callable

__all__ = ["call_at_main_end"]


def call_at_main_end(method: Callable[[], object]) -> bool:
    """Have ``method``, of an object that this does not keep alive, called once the main thread has
    run to its end; other threads may run on meanwhile. Must not raise.

    Returns whether that will happen: Python may lack the means, or be ending already.
    """
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    # What concurrent.futures uses for the purpose; there is no public name.
    register: Callable[[Callable[[], None]], None] | None = getattr(
        threading, "_register_atexit", None
    )
    if register is None:
        return False
    try:
        register(call)
    except RuntimeError:
        return False
    return True
