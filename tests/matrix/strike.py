"""How a call is made to fail on a rank: by raising, by hanging, by the death of the process.

Belongs here: the blow itself, and how ranks tell each other of it. Does not belong here: which
calls there are (``sites``), and what has to come of it (``verdict``).

Ranks talk through files in one directory, because a struck call may run in any process of a rank.
"""

from __future__ import annotations

import concurrent.futures
import fnmatch
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.futures import Future

from dcp_engine.storage import ByteStore, ByteStoreFile
from storage_backends.testing.wrapping import WrappingByteStore

__all__ = ["Boom", "OwnBase", "Strike", "StruckStore", "Unpicklable", "strike_method"]

TOGETHER = 5.0
"""Seconds that ranks which are to fail together wait for each other, at most."""


class Boom(Exception):
    """An error like any other."""


class Unpicklable(Exception):
    """Cannot travel to another rank."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class OwnBase(BaseException):
    """No ``Exception``, and no wish to exit either."""


ERRORS: dict[str, type[BaseException]] = {
    "exception": Boom,
    "unpicklable": Unpicklable,
    "keyboard": KeyboardInterrupt,
    "exit": SystemExit,
    "own base": OwnBase,
}


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One blow in one call of one operation, on each of ``ranks``."""

    control: str
    """The directory through which the ranks talk."""
    label: str
    rank: int
    ranks: tuple[int, ...]
    how: str
    """A key of ``ERRORS``, ``"hang"`` or ``"kill"``."""
    when: str
    """``"before"`` the real call, ``"after"`` it, or in the ``"future"`` that it returns."""
    nth: int = 1
    together: bool
    """The ranks meet before they are struck."""
    waiters: tuple[int, ...]
    """A hang ends when all of these have ended the operation ..."""
    limit: float
    """... or after so many seconds."""

    def around(self, call: Callable[[], Any]) -> Any:
        """``call()``, struck if it is the ``nth`` one here."""
        if not self._is_due():
            return call()
        if self.when == "before":
            self.land()
            return call()
        result = call()
        if self.when == "future" and isinstance(result, concurrent.futures.Future):
            return self._struck_later(result)
        if self.when == "future":
            return _StruckFuture(result, self)
        self.land()
        return result

    def _struck_later(self, real: concurrent.futures.Future[Any]) -> concurrent.futures.Future[Any]:
        struck: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def complete() -> None:
            try:
                result = real.result()
                self.land()
            except BaseException as error:
                struck.set_exception(error)
            else:
                struck.set_result(result)

        threading.Thread(target=complete, name="struck future", daemon=True).start()
        return struck

    def _is_due(self) -> bool:
        if self.rank not in self.ranks:
            return False
        for number in range(1, self.nth + 1):
            claim = Path(self.control, f"{self.label}-call-{self.rank}-{number}")
            try:
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            return number == self.nth
        return False

    def land(self) -> None:
        """Fail as told. What is raised says "injected"."""
        if self.together:
            _touch(self.control, f"{self.label}-here-{self.rank}")
            _wait(lambda: self._all("here", self.ranks), TOGETHER)
        _touch(self.control, f"{self.label}-fired-{self.rank}")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            if not self.waiters:
                time.sleep(self.limit)
            _wait(lambda: self._all_done(), self.limit)
            return
        raise ERRORS[self.how](f"injected into {self.label} on rank {self.rank}")

    def _all(self, what: str, ranks: tuple[int, ...]) -> bool:
        return all(Path(self.control, f"{self.label}-{what}-{rank}").exists() for rank in ranks)

    def _all_done(self) -> bool:
        return all(Path(self.control, f"done-{rank}").exists() for rank in self.waiters)


def fired(control: str, label: str) -> list[int]:
    """The ranks that were struck."""
    return sorted(
        int(path.name.rpartition("-")[2]) for path in Path(control).glob(f"{label}-fired-*")
    )


def wait_for_blow(control: str, label: str, limit: float) -> None:
    """Until some rank was struck, for so many seconds at most."""
    _wait(lambda: bool(fired(control, label)), limit)


def mark_done(control: str, rank: int) -> None:
    """This rank has ended the operation: whoever hangs may go on."""
    _touch(control, f"done-{rank}")


def _touch(directory: str, name: str) -> None:
    os.close(os.open(Path(directory, name), os.O_CREAT | os.O_WRONLY))


def _wait(until: Callable[[], bool], limit: float) -> None:
    end = time.monotonic() + limit
    while not until() and time.monotonic() < end:
        time.sleep(0.003)


class _StruckFuture(Future[Any]):
    """torch's takes no ``BaseException``."""

    def __init__(self, real: Future[Any], strike: Strike) -> None:
        super().__init__()
        self._real = real
        self._strike = strike

    def wait(self) -> Any:
        result = self._real.wait()
        self._strike.land()
        return result


class _StruckMethod:
    """Stands on an instance in place of its method, and can be pickled with it."""

    def __init__(self, owner: Any, method: str, strike: Strike) -> None:
        self._owner = owner
        self._method = method
        self._strike = strike

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        real = getattr(type(self._owner), self._method)
        return self._strike.around(lambda: real(self._owner, *args, **kwargs))


def strike_method(owner: Any, method: str, strike: Strike) -> None:
    """Strike ``owner.method``, which may be a property."""
    real = getattr(type(owner), method)
    if isinstance(real, property):
        struck = property(lambda self: strike.around(lambda: real.__get__(self)))
        owner.__class__ = type(type(owner).__name__, (type(owner),), {method: struck})
    else:
        setattr(owner, method, _StruckMethod(owner, method, strike))


class StruckStore(WrappingByteStore):
    """A store one of whose operations is struck, on files whose names match ``pattern``."""

    def __init__(self, inner: ByteStore, operation: str, pattern: str, strike: Strike) -> None:
        super().__init__(inner)
        self._operation = operation
        self._pattern = pattern
        self._strike = strike

    def around(self, operation: str, name: str, call: Callable[[], Any]) -> Any:
        if operation == self._operation and fnmatch.fnmatchcase(name, self._pattern):
            return self._strike.around(call)
        return call()

    def write_to(self, file: ByteStoreFile, name: str, buffers: Any, offset: int) -> None:
        self.around("write", name, lambda: file.write(buffers, offset))

    def close(self) -> None:
        self.around("close_store", "", self.inner.close)
