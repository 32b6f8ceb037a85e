"""Futures without their values."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

__all__ = ["wrap_future"]


def wrap_future(original_result: Any) -> Future[None]:
    """A future that is done when ``original_result`` is, with None instead of its value.

    It fails with what the original fails with, ``CancelledError`` included. What is no future
    counts as done.
    """
    wrapped: Future[None] = Future()
    wrapped.set_running_or_notify_cancel()
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
