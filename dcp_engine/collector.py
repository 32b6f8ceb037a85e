"""The cyclic garbage collector, kept from running while many objects are made on purpose.

Describing 20,000 tensors makes some hundred thousand objects, none of them garbage; the collector
would look at all of them, and at all of the trainer's, again and again: more than half of the
time it took. Belongs here: the pause. Does not belong here: anything that waits for storage or
for other ranks, which must not be inside a pause.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the collector off inside the block, or inside a function that this decorates.

    Threads may overlap: the block that found the collector on turns it on again, and the ones
    inside it change nothing, so that it never stays off. Where the trainer has turned it off
    itself, it stays off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
