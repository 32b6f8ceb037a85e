"""The stores of this package keep the contract, and so do the kit's doubles around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_engine.storage import ByteStore
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.memory import MemoryStore
from storage_backends.testing import (
    ByteStoreContract,
    FaultyByteStore,
    RecordingByteStore,
    WrappingByteStore,
)
from storage_backends.testing.contracts.fixtures import OpenStore
from storage_backends.testing.contracts.medium import DirectoryMedium, Medium
from tests.storage_backends.mediums import MemoryMedium


class TestFileSystemStore(ByteStoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenStore:
        return lambda: FileSystemStore(tmp_path / "root" / "checkpoint")

    @pytest.fixture
    def medium(self, tmp_path: Path) -> Medium:
        return DirectoryMedium(tmp_path / "root" / "checkpoint")

    @pytest.fixture
    def url(self, tmp_path: Path) -> str | None:
        return f"file://{tmp_path}/root/checkpoint"


class TestFileSystemStoreWithoutSync(TestFileSystemStore):
    MANY_FILES = 10

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenStore:
        return lambda: FileSystemStore(tmp_path / "root" / "checkpoint", sync=False)

    @pytest.fixture
    def url(self, tmp_path: Path) -> str | None:
        return None


class TestMemoryStore(ByteStoreContract):
    @pytest.fixture
    def memory(self) -> MemoryStore:
        return MemoryStore("memory://here")

    @pytest.fixture
    def open_store(self, memory: MemoryStore) -> OpenStore:
        return lambda: memory

    @pytest.fixture
    def medium(self, memory: MemoryStore) -> Medium:
        return MemoryMedium(memory)


class TestDoubles(TestMemoryStore):
    """A double that has nothing to do is a store like any other."""

    MANY_FILES = 10
    LARGE = 100_000

    @pytest.fixture(params=[WrappingByteStore, FaultyByteStore, RecordingByteStore])
    def open_store(self, request: pytest.FixtureRequest, memory: MemoryStore) -> OpenStore:
        def opened() -> ByteStore:
            double: ByteStore = request.param(memory)
            return double

        return opened
