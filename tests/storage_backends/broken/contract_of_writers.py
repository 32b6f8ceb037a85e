"""The contracts on every broken writer and reader; as ``contract_of_stores``."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage_backends.testing import StorageReaderContract, StorageWriterContract
from storage_backends.testing.contracts.driving import CheckpointId
from storage_backends.testing.contracts.medium import DirectoryMedium, Medium
from storage_backends.testing.contracts.places import MakeReader, MakeWriter
from tests.compat.file_storage import FileReader, FileWriter
from tests.storage_backends.broken.writers import READERS_CAUGHT_BY, WRITERS_CAUGHT_BY


class OfBroken(StorageWriterContract, StorageReaderContract):
    foreign_place = "s3://bucket/checkpoint"
    writer: type[FileWriter] = FileWriter
    reader: type[FileReader] = FileReader

    @pytest.fixture
    def place(self, tmp_path: Path) -> CheckpointId:
        return tmp_path / "checkpoint"

    @pytest.fixture
    def other_place(self, tmp_path: Path) -> CheckpointId:
        return tmp_path / "other"

    @pytest.fixture
    def make_writer(self, place: CheckpointId) -> MakeWriter:
        return lambda: self.writer(place)

    @pytest.fixture
    def make_reader(self, place: CheckpointId) -> MakeReader:
        return lambda: self.reader(place)

    @pytest.fixture
    def medium(self, place: CheckpointId) -> Medium:
        return DirectoryMedium(place)


class TestSound(OfBroken):
    notices_damage = False  # nor would it, so this one check is skipped


for writer in WRITERS_CAUGHT_BY:
    name = f"Test{writer.__name__}"
    globals()[name] = type(name, (OfBroken,), {"writer": writer})
for reader in READERS_CAUGHT_BY:
    name = f"Test{reader.__name__}"
    globals()[name] = type(name, (OfBroken,), {"reader": reader})
