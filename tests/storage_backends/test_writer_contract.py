"""The writers and readers of this package keep the contracts."""

from __future__ import annotations

import pytest

from storage_backends.filesystem import FileSystemReader, FileSystemWriter
from storage_backends.memory import MemoryStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing import (
    FaultyStorageReader,
    FaultyStorageWriter,
    StorageReaderContract,
    StorageWriterContract,
    faulty_reader,
    faulty_writer,
)
from storage_backends.testing.contracts.driving import CheckpointId
from storage_backends.testing.contracts.medium import Medium
from storage_backends.testing.contracts.places import MakeReader, MakeWriter
from tests.storage_backends.in_directories import InDirectories
from tests.storage_backends.mediums import MemoryMedium


class TestFileSystem(InDirectories):
    writer = FileSystemWriter
    reader = FileSystemReader


class TestMemory(StorageWriterContract, StorageReaderContract):
    several_ranks = False

    @pytest.fixture
    def stores(self) -> dict[str, MemoryStore]:
        return {name: MemoryStore(name) for name in ("memory://here", "memory://there")}

    @pytest.fixture
    def place(self) -> CheckpointId:
        return "memory://here"

    @pytest.fixture
    def other_place(self) -> CheckpointId:
        return "memory://there"

    @pytest.fixture
    def make_writer(self, place: CheckpointId, stores: dict[str, MemoryStore]) -> MakeWriter:
        return lambda: ShardedWriter(lambda url: stores[str(url)], place)

    @pytest.fixture
    def make_reader(self, place: CheckpointId, stores: dict[str, MemoryStore]) -> MakeReader:
        return lambda: ShardedReader(lambda url: stores[str(url)], place)

    @pytest.fixture
    def medium(self, stores: dict[str, MemoryStore]) -> Medium:
        return MemoryMedium(stores["memory://here"])


class TestDoubles(TestFileSystem):
    """A double that has nothing to do is a writer or a reader like any other."""

    foreign_place = None

    @pytest.fixture(params=["columns", "items"])
    def make_writer(self, request: pytest.FixtureRequest, place: CheckpointId) -> MakeWriter:
        if request.param == "items":
            return lambda: FaultyStorageWriter(FileSystemWriter(place), [])
        return lambda: faulty_writer(FileSystemWriter(place), [])

    @pytest.fixture(params=["columns", "items"])
    def make_reader(self, request: pytest.FixtureRequest, place: CheckpointId) -> MakeReader:
        if request.param == "items":
            return lambda: FaultyStorageReader(FileSystemReader(place), [])
        return lambda: faulty_reader(FileSystemReader(place), [])
