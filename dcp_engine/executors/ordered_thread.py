"""A thread that runs callables one after another.

Belongs here: order, futures, and ending. Does not belong here: what is run.

Why not ``ThreadPoolExecutor``: its threads are joined at exit without any deadline, before other
exit handlers get to say so, and it refuses work from then on. Here the thread is a daemon and the
owner decides how long to wait for it (``close``).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from dcp_engine.errors import UsageError

__all__ = ["OrderedThread"]

_T = TypeVar("_T")
_Item = tuple[Callable[[], Any], "Future[Any]"]


class OrderedThread:
    """Started at the first ``submit``. Methods may be called from any thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._state = threading.Condition()
        self._pending = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, fn: Callable[[], _T]) -> Future[_T]:
        """Run ``fn`` after everything that was submitted before.

        Whatever it raises, ``SystemExit`` too, ends in the future, and the thread goes on. The
        future can be cancelled until ``fn`` begins.

        Raises:
            UsageError: the thread is closed, or the interpreter ends and has none left to give.
        """
        future: Future[_T] = Future()
        with self._state:
            if self._closed:
                raise UsageError(f"the thread {self._name} is closed and takes nothing more")
            self._start()
            self._pending += 1
            self._items.put((fn, future))
        return future

    def is_current(self) -> bool:
        """Whether the caller runs on it, in which case nothing that it waits for here comes."""
        return threading.current_thread() is self._thread

    def pending(self) -> int:
        """How many callables were submitted and have not ended."""
        with self._state:
            return self._pending

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until nothing is pending; whether that came within ``timeout`` seconds.

        On the thread itself it says only whether nothing is pending, which is never so.
        """
        if self.is_current():
            timeout = 0.0
        with self._state:
            return self._state.wait_for(lambda: self._pending == 0, timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing more, and wait until what is there has run; None waits without end.

        Returns:
            False if something was still running or waiting after ``timeout`` seconds. It goes on,
            as long as the process does; closing again waits again.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._state:
            if not self._closed:
                self._closed = True
                self._items.put(None)
        if not self.wait_idle(timeout):
            return False
        thread = self._thread
        if thread is not None and not self.is_current():
            thread.join(None if end is None else max(end - time.monotonic(), 0.0))
        return True

    def _start(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise UsageError(
                f"the thread {self._name} cannot be started: {error}",
                hint="the interpreter is ending: save before the end of the program",
            ) from error
        self._thread = thread

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            fn, future = item
            _run_into(fn, future)
            # Nothing of it may live on until the next one comes.
            del item, fn, future
            with self._state:
                self._pending -= 1
                self._state.notify_all()

    def __enter__(self) -> OrderedThread:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _run_into(fn: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
