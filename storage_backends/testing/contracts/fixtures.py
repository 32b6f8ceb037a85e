"""Fixtures and helpers of the byte store contract.

Belongs here: what a backend provides, and what every group of checks uses. Does not belong here:
any check.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest

from dcp_engine.storage import ByteStore
from storage_backends.testing.contracts.medium import Medium

__all__ = ["OpenStore", "StoreFixtures", "in_parallel", "pattern", "write_file"]

OpenStore = Callable[[], ByteStore]

_PATIENCE = 120.0
"""Seconds after which a call counts as hanging."""


class StoreFixtures:
    """What a subclass overrides: ``open_store`` and ``medium``, and ``url`` if it can."""

    LARGE: ClassVar[int] = (9 << 20) + 12_345
    """Bytes of a large file: more than one part of a multipart upload."""
    MANY_FILES: ClassVar[int] = 1_100
    """Files in one listing: more than one page of it."""
    ROUNDS: ClassVar[int] = 30
    """How often a race is run."""

    @pytest.fixture
    def open_store(self) -> OpenStore:
        """Opens one and the same place again and again; a fresh, empty place for every test."""
        raise NotImplementedError("override the fixture open_store")

    @pytest.fixture
    def medium(self) -> Medium:
        """The place of ``open_store``, looked at without it."""
        raise NotImplementedError("override the fixture medium")

    @pytest.fixture
    def url(self) -> str | None:
        """What ``dcp_engine.registry.BackendRegistry().open_store`` opens the same place by, in
        another process too; None where the backend is not installed under a scheme."""
        return None

    @pytest.fixture
    def store(self, open_store: OpenStore) -> Iterator[ByteStore]:
        """A store whose root exists."""
        with open_store() as store:
            store.make_directory("")
            yield store

    @pytest.fixture
    def other(self, open_store: OpenStore, store: ByteStore) -> Iterator[ByteStore]:
        """Another store of the same place."""
        with open_store() as other:
            yield other

    @pytest.fixture
    def has_directories(self, store: ByteStore) -> bool:
        """Whether the medium knows directories, by what it lists."""
        store.make_directory("probe")
        found = any(file.name == "probe/" for file in store.list("probe"))
        store.delete(["probe/"])
        return found


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that repeat with no power of two, so that a displaced block shows."""
    unit = bytes((seed * 37 + i * 7 + i // 251) % 256 for i in range(min(nbytes, 1021)))
    return (unit * (nbytes // 1021 + 1))[:nbytes]


def alike(found: object, wanted: object) -> bool:
    """Whether they are equal. In an ``assert`` instead of ``==`` where there may be megabytes: with
    ``CI`` set pytest prints what differs in full, and looks for it for minutes."""
    return found == wanted


def write_file(store: ByteStore, name: str, data: bytes) -> None:
    """``name`` with ``data``, in one write."""
    file = store.create(name, len(data))
    file.write([memoryview(data)], 0)
    file.sync()
    file.close()


def in_parallel(count: int, call: Callable[[int], None]) -> None:
    """``call(0)`` to ``call(count - 1)`` at once, each in a thread; raises what one raised."""
    barrier = threading.Barrier(count)
    errors: list[BaseException] = []

    def one(number: int) -> None:
        try:
            barrier.wait(_PATIENCE)
            call(number)
        except BaseException as error:  # to be raised in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE)
        assert not thread.is_alive(), "a call hangs when several threads call at once"
    if errors:
        raise errors[0]
