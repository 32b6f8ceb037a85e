"""One connection to a c10d store.

Belongs here: calls, how their errors are told apart, values larger than the store takes, counting.
Does not belong here: what the keys mean.

Facts that this module answers (torch 2.13): a ``TCPStore`` refuses values over 8 MiB by dropping
the connection; ``check``, ``add`` and ``compare_set`` read the answer without any timeout, so a
store whose host is frozen blocks them for ever. Therefore a client is used by one thread, and
others ask ``overdue`` whether that thread is stuck. Where a key may never come, ``limits`` ends the
wait for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, TypeVar

from dcp_engine.coordination.limits import BEYOND, WaitLimit
from dcp_engine.errors import CoordinationError

__all__ = ["AtLimit", "KeyValueStore", "StoreClient", "StoreCounters", "WaitTimeout"]

PIECE = 4 << 20
"""Bytes; larger values are split. Half of what a TCPStore takes."""
_BATCH_KEYS = 1024
_BATCH_BYTES = 16 << 20
_WHOLE = b"\x00"
_SPLIT = b"\x01"


class KeyValueStore(Protocol):
    """The methods of a c10d ``Store`` that are used."""

    def set(self, key: str, value: bytes, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: bytes, desired: bytes, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def multi_set(self, keys: list[str], values: list[bytes], /) -> None: ...
    def set_timeout(self, timeout: timedelta, /) -> None: ...


class WaitTimeout(Exception):
    """A key did not come in time. Never leaves this package."""


@dataclass(frozen=True, kw_only=True)
class StoreCounters:
    """What a session asked of the store so far."""

    calls: Mapping[str, int] = field(default_factory=dict)
    """By name of the store's method."""
    bytes_out: int = 0
    bytes_in: int = 0
    connections: int = 0
    """Opened by this rank."""

    @property
    def total(self) -> int:
        """All calls."""
        return sum(self.calls.values())

    def __add__(self, other: StoreCounters) -> StoreCounters:
        return StoreCounters(
            calls=Counter(self.calls) + Counter(other.calls),
            bytes_out=self.bytes_out + other.bytes_out,
            bytes_in=self.bytes_in + other.bytes_in,
            connections=self.connections + other.connections,
        )


_Result = TypeVar("_Result")


class StoreClient:
    """Used by one thread at a time; ``overdue`` may be asked from any.

    Args:
        store: connection that nobody else uses.
        location: where the store is, for messages (``host:port``).
        patience: seconds a call may take whose answer needs no other rank.
    """

    def __init__(self, store: KeyValueStore, location: str, patience: float = 60.0) -> None:
        self._store = store
        self.location = location
        self.patience = patience
        self.calls: dict[str, int] = {}
        self.bytes_out = 0
        self.bytes_in = 0
        self.lost: CoordinationError | None = None
        self._busy: tuple[float, float] | None = None
        self.limit: WaitLimit[StoreClient] | None = None
        """Of the wait that goes on now, if that is to be ended by another connection."""

    @property
    def counters(self) -> StoreCounters:
        """What this connection asked of the store so far."""
        return StoreCounters(
            calls=dict(self.calls),
            bytes_out=self.bytes_out,
            bytes_in=self.bytes_in,
            connections=1,
        )

    def move_to(self, store: KeyValueStore) -> None:
        """Go on with another view of the same connection."""
        self._store = store

    # -- calls ---------------------------------------------------------------------------------

    def set(self, key: str, value: bytes) -> None:
        """Write a value of at most ``PIECE`` bytes."""
        self.bytes_out += len(value)
        self._call("set", self.patience, lambda: self._store.set(key, value))

    def multi_set(self, items: Mapping[str, bytes]) -> None:
        """Write many values in few messages."""
        for batch in _batches(items):
            self.bytes_out += sum(map(len, batch.values()))

            def write(batch: dict[str, bytes] = batch) -> None:
                self._store.multi_set(list(batch), list(batch.values()))

            self._call("multi_set", self.patience, write)

    def get(
        self,
        key: str,
        timeout: float | None = None,
        at_limit: AtLimit | None = None,
        lead: float = 0.0,
    ) -> bytes:
        """Wait for a key and read it.

        Args:
            at_limit: makes the key come when the time is up, see ``limits``. For keys that may
                never come.
            lead: seconds before, at most half of the wait, from which on there is a connection for
                that.

        Raises:
            WaitTimeout: it did not come within ``timeout`` seconds.
        """
        limit = self.patience if timeout is None else max(timeout, 0.001)
        ending = None
        if at_limit is not None:
            ending = WaitLimit(time.monotonic() + limit, at_limit, min(lead, limit / 2))

        def read() -> bytes:
            if ending is None:
                self._store.set_timeout(timedelta(seconds=limit))
                return self._store.get(key)
            self._store.set_timeout(timedelta(seconds=limit + BEYOND))
            self.limit = ending
            try:
                return self._store.get(key)
            finally:
                self.limit = None
                ending.leave()

        value = self._call("get", limit, read)
        self.bytes_in += len(value)
        return value

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Read keys that are there."""
        values: list[bytes] = []
        for start in range(0, len(keys), _BATCH_KEYS):
            batch = list(keys[start : start + _BATCH_KEYS])

            def read(batch: list[str] = batch) -> list[bytes]:
                self._store.set_timeout(timedelta(seconds=self.patience))
                return self._store.multi_get(batch)

            values.extend(self._call("multi_get", self.patience, read))
        self.bytes_in += sum(map(len, values))
        return values

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which begins at 0, and return its value."""
        return self._call("add", self.patience, lambda: self._store.add(key, amount))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return self._call("check", self.patience, lambda: self._store.check(list(keys)))

    def compare_set(self, key: str, value: bytes) -> bytes:
        """Write a key that is not there yet; return what it holds then."""
        self.bytes_out += len(value)
        held = self._call(
            "compare_set", self.patience, lambda: self._store.compare_set(key, b"", value)
        )
        self.bytes_in += len(held)
        return held

    def delete(self, key: str) -> None:
        """Remove a key; it need not be there."""
        self._call("delete_key", self.patience, lambda: self._store.delete_key(key))

    # -- values of any size --------------------------------------------------------------------

    def multi_put(
        self, items: Mapping[str, bytes], extra: Mapping[str, bytes] | None = None
    ) -> dict[str, int]:
        """Write values of any size, and then, in the last message, ``extra`` as it is.

        Returns:
            The number of pieces of each value that was split, for ``delete_pieces``.
        """
        heads: dict[str, bytes] = {}
        split: dict[str, int] = {}
        for key, value in items.items():
            if len(value) < PIECE:
                heads[key] = _WHOLE + value
                continue
            split[key] = pieces = -(-len(value) // PIECE)
            for index in range(pieces):
                self.set(f"{key}/{index}", value[index * PIECE : (index + 1) * PIECE])
            heads[key] = _SPLIT + str(pieces).encode()
        self.multi_set({**heads, **(extra or {})})
        return split

    def offer(self, key: str, value: bytes) -> bool:
        """Write a value of less than ``PIECE`` bytes, for ``take``, unless there is one; return
        whether there was none."""
        return self.compare_set(key, _WHOLE + value) == _WHOLE + value

    def take(
        self,
        key: str,
        timeout: float | None = None,
        at_limit: AtLimit | None = None,
        lead: float = 0.0,
    ) -> tuple[bytes, int]:
        """Wait for a value of any size, as ``get``; return it and the number of its pieces."""
        return self._whole(key, self.get(key, timeout, at_limit, lead))

    def multi_take(self, keys: Sequence[str]) -> list[bytes]:
        """Read values of any size that are there."""
        heads = self.multi_get(keys)
        return [self._whole(key, head)[0] for key, head in zip(keys, heads, strict=True)]

    def pieces_of(self, keys: Sequence[str]) -> dict[str, int]:
        """Into how many pieces the values of keys that are there are split; 0 if whole."""
        heads = self.multi_get(keys)
        return {
            key: int(head[1:]) if head[:1] == _SPLIT else 0
            for key, head in zip(keys, heads, strict=True)
        }

    def _whole(self, key: str, head: bytes) -> tuple[bytes, int]:
        if head[:1] == _WHOLE:
            return head[1:], 0
        pieces = int(head[1:])
        return b"".join(self.get(f"{key}/{index}") for index in range(pieces)), pieces

    def delete_pieces(self, key: str, pieces: int) -> None:
        """Remove the pieces of a value, but not its head."""
        for index in range(pieces):
            self.delete(f"{key}/{index}")

    # -- errors --------------------------------------------------------------------------------

    def overdue(self, slack: float) -> bool:
        """Whether the present call has taken ``slack`` seconds more than it may."""
        busy = self._busy
        return busy is not None and time.monotonic() > busy[0] + busy[1] + slack

    def lose(self, reason: str) -> CoordinationError:
        """Give the connection up; every later call raises the error that is returned."""
        if self.lost is None:
            self.lost = CoordinationError(
                f"the store at {self.location} does not answer: {reason}",
                kind="store_lost",
                hint="the process that hosts the store, or the way to it, is gone; restart the job",
            )
        return self.lost

    def _call(self, name: str, budget: float, call: Callable[[], _Result]) -> _Result:
        if self.lost is not None:
            raise self.lost
        self.calls[name] = self.calls.get(name, 0) + 1
        self._busy = (time.monotonic(), budget)
        try:
            return call()
        except RuntimeError as error:  # all errors of c10d stores are
            reason = _first_line(error)
            if type(error).__name__ != "DistNetworkError" and "timeout" in reason.lower():
                raise WaitTimeout(reason) from None
            raise self.lose(reason) from None
        finally:
            self._busy = None


AtLimit = Callable[[StoreClient], object]
"""What is done, over another connection, when the time of a wait is up."""


def _first_line(error: BaseException) -> str:
    """The message without the C++ frames that some builds of torch put behind it."""
    text = str(error).split("Exception raised from", 1)[0].strip()
    return text.splitlines()[0] if text else type(error).__name__


def _batches(items: Mapping[str, bytes]) -> list[dict[str, bytes]]:
    batches: list[dict[str, bytes]] = [{}]
    size = 0
    for key, value in items.items():
        if batches[-1] and (len(batches[-1]) >= _BATCH_KEYS or size + len(value) > _BATCH_BYTES):
            batches.append({})
            size = 0
        batches[-1][key] = value
        size += len(value)
    return batches if batches[0] else []
