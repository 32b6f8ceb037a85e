"""Where the answers to requests wait for their callers.

Belongs here: matching answers to requests by number. Does not belong here: what they say.
"""

from __future__ import annotations

import queue
import threading

from dcp_engine.executors.process.protocol import FromWorker

__all__ = ["Inbox", "Inboxes"]

Inbox = queue.Queue[tuple[FromWorker, bytes] | None]
"""Messages with their bodies; None when the worker has ended. No ``SimpleQueue``: its ``get`` waits
for ever if the time is up before it begins to wait (Python 3.11)."""


class Inboxes:
    """One for each request that somebody waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, Inbox] = {}
        self._next = 1
        self._ended = False

    def open(self) -> tuple[int, Inbox]:
        """A number for a new request, and where its answer will be."""
        inbox: Inbox = queue.Queue()
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._open[number] = inbox
            if self._ended:
                inbox.put(None)
        return number, inbox

    def close(self, number: int) -> None:
        """Nobody waits any more: what still comes is dropped."""
        with self._lock:
            self._open.pop(number, None)

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for an answer."""
        with self._lock:
            return bool(self._open)

    def deliver(self, number: int, message: FromWorker, body: bytes) -> None:
        """To whoever waits for it, if anybody does."""
        with self._lock:
            inbox = self._open.get(number)
        if inbox is not None:
            inbox.put((message, body))

    def end(self) -> None:
        """No answer will come any more."""
        with self._lock:
            self._ended = True
            waiting = list(self._open.values())
        for inbox in waiting:
            inbox.put(None)
