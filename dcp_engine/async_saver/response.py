"""What ``async_save`` returns.

Belongs here: the futures and the progress of one save. Does not belong here: who completes them.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from dcp_engine.metadata import Metadata

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "Progress"]


class AsyncCheckpointerType(enum.Enum):
    """Where an asynchronous save runs."""

    THREAD = "thread"
    """In a thread of this process."""
    PROCESS = "process"
    """In a worker process of this rank."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a save is on this rank."""

    phase: str
    """``staging``, ``waiting`` (for an earlier save, or for the worker), then the phases of a
    save (``group`` and ``join``, by which workers find each other, ``agree``, ``plan``,
    ``compare``, ``write``, ``commit``, ``committed``), and ``done`` or ``failed``."""
    bytes_done: int
    """Of the phase: bytes copied, or bytes written."""
    bytes_total: int
    """What ``bytes_done`` grows to; while writing an upper bound, since ranks share what is
    replicated."""


class AsyncSaveResponse(Future[Metadata]):
    """The future of a save's ``Metadata``: the upload itself, and how it goes on.

    Attributes:
        staging_completion: done when the state may be changed, or failed with what staging failed
            with.

    Cannot be cancelled: the other ranks take part already.
    """

    def __init__(self, staging_completion: Future[None], staged: Callable[[], Progress]) -> None:
        super().__init__()
        self.staging_completion = staging_completion
        self._staged = staged
        self._told: Progress | None = None
        self._looked_at = threading.Event()
        self.set_running_or_notify_cancel()

    @property
    def upload_completion(self) -> Future[Metadata]:
        """This future: done when the checkpoint is committed."""
        return self

    def progress(self) -> Progress:
        """How far it is, from any thread."""
        if self.done():
            failed = super().exception() is not None
            told = self._told or self._staged()
            return Progress(
                phase="failed" if failed else "done",
                bytes_done=told.bytes_done,
                bytes_total=told.bytes_total,
            )
        if self._told is None or not self.staging_completion.done():
            return self._staged()
        return self._told

    def result(self, timeout: float | None = None) -> Metadata:
        """The committed checkpoint's ``Metadata``; raises what the save failed with, or
        ``TimeoutError`` after ``timeout`` seconds."""
        self._mark_if_over(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the save failed with, or None; ``TimeoutError`` after ``timeout`` seconds."""
        self._mark_if_over(timeout)
        return super().exception(0)

    def tell(self, progress: Progress) -> None:
        """The save goes on. Called by whoever runs it."""
        self._told = progress

    def set_result(self, result: Metadata) -> None:
        """The save is over, and well. Called by whoever runs it."""
        self._let_go()
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        """The save is over. Called by whoever runs it."""
        self._let_go()
        super().set_exception(exception)

    def unseen_failure(self) -> BaseException | None:
        """The failure, if nobody has asked for the result yet."""
        if not self.done() or self._looked_at.is_set():
            return None
        return super().exception()

    def mark_seen(self) -> None:
        """The failure has come up elsewhere."""
        self._looked_at.set()

    def _let_go(self) -> None:
        """Who keeps this does not keep the copy."""
        last = self._told or self._staged()
        self._staged = lambda: last

    def _mark_if_over(self, timeout: float | None) -> None:
        super().exception(timeout)
        self._looked_at.set()
