"""Copies that custom stagers made, as long as saves need them.

Belongs here: the wait of the next copy for the ones before. Does not belong here: the engine's own
memory, which waits by itself (``staging.pool``).

A custom stager knows nothing of when a save is over, and may overwrite what it made before.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

from dcp_engine.async_saver.response import AsyncSaveResponse
from dcp_engine.metadata import Metadata
from dcp_engine.staging.stagers import AsyncStager
from dcp_engine.storage import Check

__all__ = ["CustomCopies"]

_LOOK = 0.1
"""Seconds between two looks at ``check`` while waiting."""


class CustomCopies:
    """At most ``limit`` at a time, and one of each stager."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._needed: list[tuple[AsyncStager, AsyncSaveResponse]] = []
        self._changed = threading.Condition()

    def await_turn(self, stager: AsyncStager, check: Check) -> None:
        """Until ``stager`` may make another copy; ``check`` ends the wait by raising."""
        with self._changed:
            while len(self._needed) >= self._limit or any(by is stager for by, _ in self._needed):
                check()
                self._changed.wait(_LOOK)

    def add(self, stager: AsyncStager, save: AsyncSaveResponse) -> None:
        """``save`` is of a copy that ``stager`` made."""
        with self._changed:
            self._needed.append((stager, save))
        save.add_done_callback(self._remove)

    def _remove(self, over: Future[Metadata]) -> None:
        with self._changed:
            self._needed = [(by, save) for by, save in self._needed if save is not over]
            self._changed.notify_all()
