"""What runs in a worker process, as its author sees it.

Belongs here: the interface between the worker's loop and the code that handles requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Handler", "HandlerFactory", "WorkerContext", "WorkerRequest"]


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """Where a handler runs."""

    name: str
    rank: int
    parent_pid: int


@dataclass(frozen=True, kw_only=True)
class WorkerRequest:
    """One request."""

    kind: str
    body: bytes
    descriptors: list[int] = field(default_factory=list)
    """File descriptors that came along; the handler owns them and closes them."""
    progress: Callable[[bytes], None]
    """Tell the caller something before the answer; from any thread, while the request runs."""


class Handler(Protocol):
    """Made by a factory ``(init: bytes, context: WorkerContext) -> Handler`` when the worker
    starts; called on the worker's main thread."""

    def handle(self, request: WorkerRequest) -> bytes:
        """The answer. What it raises, of whatever kind, is raised in the caller, and the worker
        goes on."""
        ...

    def close(self) -> None:
        """The worker is asked to end. Not called when its parent dies: it then ends as if
        killed."""
        ...


HandlerFactory = Callable[[bytes, WorkerContext], Handler]
