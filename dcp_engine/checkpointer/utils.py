"""Futures without values.

Belongs here: what the futures of this layer have beyond ``concurrent.futures``.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

__all__ = ["WriteFuture", "wrap_future"]


class WriteFuture(Future[None]):
    """A future that knows whether its failure was looked at. Cannot be cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self._looked_at = False
        self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> None:
        """Raises what the write failed with, or ``TimeoutError`` after ``timeout`` seconds."""
        self.exception(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the write failed with, or None; ``TimeoutError`` after ``timeout`` seconds."""
        error = super().exception(timeout)
        self._looked_at = True
        return error

    def unseen_failure(self) -> BaseException | None:
        """What it failed with, if it has and nobody has asked."""
        if self._looked_at or not self.done():
            return None
        return super().exception(0)


def wrap_future(original_result: Any) -> WriteFuture:
    """A future that is done when ``original_result`` is, with None instead of its value.

    It fails with what the original fails with, ``CancelledError`` included. What is no future
    counts as done.
    """
    wrapped = WriteFuture()
    if not isinstance(original_result, Future):
        wrapped.set_result(None)
        return wrapped

    def follow(original: Future[Any]) -> None:
        try:
            original.result()
        except BaseException as error:
            wrapped.set_exception(error)
        else:
            wrapped.set_result(None)

    original_result.add_done_callback(follow)
    return wrapped
