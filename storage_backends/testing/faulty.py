"""``FaultyByteStore``: a store that fails where a test says.

Belongs here: faults of bytes and calls. Does not belong here: faults of writers and readers
(``faulty_calls``), and a medium that is slow throughout (``throttled``).
"""

from __future__ import annotations

import errno
import fnmatch
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dcp_engine.storage import Buffer, ByteStore, ByteStoreFile, ReadRange, StoredFile
from storage_backends.os_errors import storage_error
from storage_backends.testing.wrapping import WrappingByteStore

__all__ = [
    "Action",
    "Delay",
    "Fail",
    "Fault",
    "FaultyByteStore",
    "FlipBit",
    "Hang",
    "LoseReply",
    "ShortWrite",
    "StaleListing",
    "TornWrite",
    "disk_full",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Fail:
    """Raise ``error`` instead of doing the call."""

    error: BaseException


@dataclass(frozen=True)
class LoseReply:
    """Do the call, then raise ``error``: an acknowledgement that never came."""

    error: BaseException


@dataclass(frozen=True)
class ShortWrite:
    """Write only the first ``nbytes`` bytes, and say that all was written."""

    nbytes: int


@dataclass(frozen=True)
class TornWrite:
    """Write only the first ``nbytes`` bytes, then raise ``error``."""

    nbytes: int
    error: BaseException


@dataclass(frozen=True)
class FlipBit:
    """Flip bit ``bit`` (counted from the call's first byte) of what is written or read."""

    bit: int


@dataclass(frozen=True)
class Hang:
    """Wait until ``released`` is set, then do the call."""

    released: threading.Event
    entered: threading.Event | None = None
    """Set when the call hangs."""


@dataclass(frozen=True)
class Delay:
    """Wait ``seconds``, then do the call."""

    seconds: float
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class StaleListing:
    """``list`` shows the store as it was when the fault was given to it: newer files are missing,
    removed ones are there."""


Action = Fail | LoseReply | ShortWrite | TornWrite | FlipBit | Hang | Delay | StaleListing


def disk_full() -> OSError:
    """What the system says when there is no space left: an error for ``Fail`` and its like."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """When to do what.

    ``operation`` is a method's name (``write``, ``sync``, ``close`` and ``abort`` are those of
    files) or ``"*"``; ``name`` a pattern (``fnmatch``) of the file's name, for ``list`` of its
    prefix; of the calls that match, those from the ``nth`` (1 is the first) on fail, ``times`` of
    them (None: all), on ``ranks`` (None: on all).
    """

    operation: str
    action: Action
    name: str = "*"
    nth: int = 1
    times: int | None = 1
    ranks: frozenset[int] | None = None


class _Counted:
    """A fault, how many calls have matched it, and what there was when it was given."""

    def __init__(self, fault: Fault, listing: Sequence[StoredFile]) -> None:
        self.fault = fault
        self.listing = listing
        self.seen = 0

    def is_due(self, operation: str, name: str) -> bool:
        """Count the call if it matches; whether the fault acts on it."""
        fault = self.fault
        if fault.operation not in ("*", operation) or not fnmatch.fnmatch(name, fault.name):
            return False
        self.seen += 1
        last = None if fault.times is None else fault.nth + fault.times
        return self.seen >= fault.nth and (last is None or self.seen < last)


class FaultyByteStore(WrappingByteStore):
    """Wraps any store.

    Args:
        inner: the store.
        faults: of those whose turn it is at a call, the first one acts.
        capacity: bytes that may be written (by ``write``, ``put`` and ``put_over``) before the
            medium is full: the call that goes over it writes what fits, then raises ``disk_full``.
        rank: whose store this is, for faults of chosen ranks.
    """

    def __init__(
        self,
        inner: ByteStore,
        faults: Sequence[Fault] = (),
        *,
        capacity: int | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._rank = rank
        self._faults: list[_Counted] = []
        self._free = capacity
        self.fired: list[tuple[Fault, str]] = []
        """Every fault that acted, with the name of the file."""
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """One more fault, counted from now on."""
        if fault.ranks is not None and self._rank not in fault.ranks:
            return
        is_stale = isinstance(fault.action, StaleListing)
        counted = _Counted(fault, list(self.inner.list()) if is_stale else ())
        with self._lock:
            self._faults.append(counted)

    def _next(self, operation: str, name: str) -> _Counted | None:
        with self._lock:
            due = [counted for counted in self._faults if counted.is_due(operation, name)]
            if not due:
                return None
            self.fired.append((due[0].fault, name))
            return due[0]

    def _next_action(self, operation: str, name: str) -> Action | None:
        due = self._next(operation, name)
        return None if due is None else due.fault.action

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        return _act(self._next_action(operation, name), call)

    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        due = self._next("list", prefix)
        if due is not None and isinstance(due.fault.action, StaleListing):
            return [file for file in due.listing if file.name.startswith(prefix)]
        # Here and now, not when somebody comes to iterate.
        return _act(None if due is None else due.fault.action, lambda: [*self.inner.list(prefix)])

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        self._put("put", name, data, lambda d: self.inner.put(name, d, if_absent=if_absent))

    def put_over(self, name: str, data: bytes, tag: str) -> None:
        self._put("put_over", name, data, lambda d: self.inner.put_over(name, d, tag))

    def _put(self, operation: str, name: str, data: bytes, put: Callable[[bytes], None]) -> None:
        action = self._next_action(operation, name)
        if isinstance(action, FlipBit):
            data, action = bytes(_flipped(data, action.bit)), None
        elif isinstance(action, ShortWrite):
            data, action = data[: action.nbytes], None
        elif isinstance(action, TornWrite):
            # A small object appears whole or not at all, so a torn one does not appear.
            action = Fail(action.error)
        if self._take(len(data)) < len(data):
            raise self._full(name)
        _act(action, lambda: put(data))

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        action = self._next_action("read", name)
        if not isinstance(action, FlipBit):
            _act(action, lambda: self.inner.read(name, ranges))
            return
        self.inner.read(name, ranges)
        position = action.bit // 8
        for item in ranges:
            if position < item.buffer.nbytes:
                item.buffer[position] ^= 1 << (action.bit % 8)
                return
            position -= item.buffer.nbytes

    def write_to(
        self, file: ByteStoreFile, name: str, buffers: Sequence[Buffer], offset: int
    ) -> None:
        action = self._next_action("write", name)
        nbytes = sum(buffer.nbytes for buffer in buffers)
        if isinstance(action, ShortWrite | TornWrite):
            file.write(_first(buffers, action.nbytes), offset)
            if isinstance(action, TornWrite):
                raise action.error
            return
        if isinstance(action, FlipBit):
            joined = _flipped(b"".join(buffers), action.bit)
            buffers, action = [memoryview(joined)], None
        room = self._take(nbytes)
        if room < nbytes:
            file.write(_first(buffers, room), offset)
            raise self._full(name)
        _act(action, lambda: file.write(buffers, offset))

    def _take(self, nbytes: int) -> int:
        """How many of ``nbytes`` still fit."""
        with self._lock:
            if self._free is None:
                return nbytes
            room = min(nbytes, self._free)
            self._free -= room
            return room

    def _full(self, name: str) -> OSError:
        return storage_error(disk_full(), "write the file", checkpoint=self.url, file=name)


def _act(action: Action | None, call: Callable[[], T]) -> T:
    """Faults that do not depend on bytes; one that does has no meaning for this call."""
    if isinstance(action, Fail):
        raise action.error
    if isinstance(action, Hang):
        if action.entered is not None:
            action.entered.set()
        action.released.wait()
    elif isinstance(action, Delay):
        action.sleep(action.seconds)
    elif action is not None and not isinstance(action, LoseReply):
        raise TypeError(f"{type(action).__name__} cannot be applied to this operation")
    result = call()
    if isinstance(action, LoseReply):
        raise action.error
    return result


def _flipped(data: bytes, bit: int) -> bytearray:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return changed


def _first(buffers: Sequence[Buffer], nbytes: int) -> list[Buffer]:
    """The first ``nbytes`` bytes of ``buffers``."""
    taken: list[Buffer] = []
    for buffer in buffers:
        if nbytes <= 0:
            break
        taken.append(buffer[:nbytes])
        nbytes -= buffer.nbytes
    return taken
