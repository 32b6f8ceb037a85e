"""A store for ranks that are threads of one process.

Belongs here: the few methods of a c10d store that sessions use, over a dict. A waiting rank is
woken by its own key only, which a ``HashStore`` does not do: there every write wakes everybody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

__all__ = ["MemoryStore"]


class _Shared:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[str, bytes] = {}
        self.waiting: dict[str, list[threading.Event]] = {}


class MemoryStore:
    """One rank's view; ``clone`` gives another view of the same content."""

    def __init__(self, shared: _Shared | None = None) -> None:
        self._shared = shared if shared is not None else _Shared()
        self._timeout = 300.0

    def clone(self) -> MemoryStore:
        """Another view, with a timeout of its own."""
        return MemoryStore(self._shared)

    def keys(self) -> list[str]:
        """All keys, for tests."""
        with self._shared.lock:
            return sorted(self._shared.values)

    def set_timeout(self, timeout: timedelta, /) -> None:
        """How long ``get`` and ``multi_get`` of this view wait."""
        self._timeout = timeout.total_seconds()

    def set(self, key: str, value: bytes, /) -> None:
        """Write."""
        self._change(key, lambda _: value)

    def add(self, key: str, amount: int, /) -> int:
        """Add to a decimal number, which begins at 0."""
        return int(self._change(key, lambda held: str(int(held or b"0") + amount).encode()))

    def compare_set(self, key: str, expected: bytes, desired: bytes, /) -> bytes:
        """Write if the key holds ``expected`` (empty: is not there); return what it holds."""

        def change(held: bytes | None) -> bytes:
            if held is None:
                return expected if expected else desired
            return desired if held == expected else held

        return self._change(key, change)

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there."""
        with self._shared.lock:
            return all(key in self._shared.values for key in keys)

    def delete_key(self, key: str, /) -> bool:
        """Remove; whether it was there."""
        with self._shared.lock:
            return self._shared.values.pop(key, None) is not None

    def get(self, key: str, /) -> bytes:
        """Wait and read."""
        end = time.monotonic() + self._timeout
        while True:
            with self._shared.lock:
                value = self._shared.values.get(key)
                if value is not None:
                    return value
                event = threading.Event()
                self._shared.waiting.setdefault(key, []).append(event)
            if not event.wait(max(end - time.monotonic(), 0.0)):
                raise RuntimeError(f"wait timeout after {self._timeout:.3g} s, key: {key}")

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Wait for all and read."""
        return [self.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: list[bytes], /) -> None:
        """Write all."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def _change(self, key: str, change: Callable[[bytes | None], bytes]) -> bytes:
        with self._shared.lock:
            value = change(self._shared.values.get(key))
            self._shared.values[key] = value
            woken = self._shared.waiting.pop(key, [])
        for event in woken:
            event.set()
        return value
