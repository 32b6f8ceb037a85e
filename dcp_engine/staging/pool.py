"""The arenas of one rank: how many there may be, and who has them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from dcp_engine.errors import UsageError
from dcp_engine.staging.arena import Arena
from dcp_engine.storage import Check

__all__ = ["ArenaPool"]

_LOOK = 0.1
"""Seconds between two looks at ``check`` while waiting."""


class ArenaPool:
    """At most ``limit`` arenas, made when needed and kept. Callable from several threads.

    Args:
        make: makes an empty arena.
    """

    def __init__(self, limit: int, make: Callable[[], Arena]) -> None:
        if limit < 1:
            raise UsageError(f"staging needs at least one arena, not {limit}")
        self._limit = limit
        self._make = make
        self._all: list[Arena] = []
        self._free: list[Arena] = []
        self._changed = threading.Condition()
        self._closed = False

    def take(self, nbytes: int, check: Check) -> Arena:
        """An arena that nobody else has: the smallest one with room for ``nbytes``, else the
        largest, else a new one. Waits until there is one; ``check`` ends the wait by raising."""
        with self._changed:
            while True:
                if self._closed:
                    raise UsageError("the stager is closed")
                if self._free:
                    fitting = [arena for arena in self._free if arena.size >= nbytes]
                    by_size = sorted(fitting or self._free, key=lambda arena: arena.size)
                    arena = by_size[0] if fitting else by_size[-1]
                    self._free.remove(arena)
                    return arena
                if len(self._all) < self._limit:
                    arena = self._make()
                    self._all.append(arena)
                    return arena
                check()
                self._changed.wait(_LOOK)

    def give_back(self, arena: Arena) -> None:
        """The taker is done with ``arena``, and whoever reads from it too."""
        with self._changed:
            if self._closed:
                arena.close()
            elif arena not in self._free:
                self._free.append(arena)
                self._changed.notify()

    def free(self) -> list[Arena]:
        """The arenas that nobody has."""
        with self._changed:
            return list(self._free)

    def present(self) -> int:
        """Bytes of host memory that the arenas take."""
        with self._changed:
            return sum(arena.present() for arena in self._all if not arena.closed)

    def close(self) -> None:
        """Close the free arenas now, and the others when they are given back."""
        with self._changed:
            self._closed = True
            for arena in self._free:
                arena.close()
            self._free.clear()
            self._changed.notify_all()
