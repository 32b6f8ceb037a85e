"""Stores of every kind that the writer must serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dcp_engine.storage import ByteStore
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.memory import MemoryStore
from storage_backends.testing.wrapping import WrappingByteStore


class ObjectStoreLike(WrappingByteStore):
    """No rename, no offsets, no directories to sync: what an object store offers."""

    def __init__(self, inner: ByteStore) -> None:
        super().__init__(inner)
        self.atomic_replace = False
        self.random_write = False
        self.durable_sync = False

    def replace(self, source: str, target: str) -> None:
        raise AssertionError("an object store cannot rename")


OpenStore = Callable[[], ByteStore]


@pytest.fixture(params=["filesystem", "memory", "object store"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Opens one and the same place again and again."""
    if request.param == "filesystem":
        return lambda: FileSystemStore(tmp_path / "checkpoint")
    memory = MemoryStore()
    memory.shared_between_processes = True  # several "ranks" of one process here
    if request.param == "memory":
        return lambda: memory
    return lambda: ObjectStoreLike(memory)
