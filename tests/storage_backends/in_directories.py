"""The contracts of writers and readers on what keeps its checkpoints in directories.

Belongs here: the fixtures. Does not belong here: any writer or reader.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from storage_backends.testing import StorageReaderContract, StorageWriterContract
from storage_backends.testing.contracts.driving import CheckpointId
from storage_backends.testing.contracts.medium import DirectoryMedium, Medium
from storage_backends.testing.contracts.places import MakeReader, MakeWriter

__all__ = ["InDirectories"]


class InDirectories(StorageWriterContract, StorageReaderContract):
    foreign_place = "s3://bucket/checkpoint"
    writer: ClassVar[Callable[..., Any]]
    reader: ClassVar[Callable[..., Any]]

    @pytest.fixture
    def place(self, tmp_path: Path) -> CheckpointId:
        return tmp_path / "checkpoint"

    @pytest.fixture
    def other_place(self, tmp_path: Path) -> CheckpointId:
        return tmp_path / "other"

    @pytest.fixture
    def make_writer(self, place: CheckpointId) -> MakeWriter:
        return lambda: type(self).writer(place)

    @pytest.fixture
    def make_reader(self, place: CheckpointId) -> MakeReader:
        return lambda: type(self).reader(place)

    @pytest.fixture
    def medium(self, place: CheckpointId) -> Medium:
        return DirectoryMedium(place)
