"""Fixtures of the contracts of writers and readers.

Belongs here: what a backend provides. Does not belong here: any check.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

import pytest

from dcp_engine.storage import StorageReader, StorageWriter
from storage_backends.testing.contracts.driving import (
    CheckpointId,
    LoadingRank,
    SavingRank,
    compare,
    empty_state,
    load_by_hand,
    save_by_hand,
)
from storage_backends.testing.contracts.medium import Medium

__all__ = ["MakeReader", "MakeWriter", "PlaceFixtures"]

MakeWriter = Callable[[], StorageWriter]
MakeReader = Callable[[], StorageReader]


class PlaceFixtures:
    """What a subclass overrides: ``make_writer``, ``make_reader``, ``place`` and ``medium``."""

    several_ranks: ClassVar[bool] = True
    """Whether writers and readers of several ranks can meet, also in this one process."""
    foreign_place: ClassVar[CheckpointId | None] = None
    """A checkpoint id that is not for this backend, for ``validate_checkpoint_id``."""

    @pytest.fixture
    def place(self) -> CheckpointId:
        """A checkpoint id; nothing is there yet."""
        raise NotImplementedError("override the fixture place")

    @pytest.fixture
    def other_place(self) -> CheckpointId | None:
        """Another checkpoint id at which nothing is yet, or None."""
        return None

    @pytest.fixture
    def make_writer(self, place: CheckpointId) -> MakeWriter:
        """Makes a writer that points to ``place``."""
        raise NotImplementedError("override the fixture make_writer")

    @pytest.fixture
    def make_reader(self, place: CheckpointId) -> MakeReader:
        """Makes a reader that points to ``place``."""
        raise NotImplementedError("override the fixture make_reader")

    @pytest.fixture
    def medium(self) -> Medium:
        """What lies at ``place``, looked at without writer and reader."""
        raise NotImplementedError("override the fixture medium")

    @pytest.fixture
    def engine(self) -> Any:
        """The module ``dcp_engine``. By name: backends are below the engine, which imports none
        of them, so that no backend may import it either."""
        return import_module("dcp_engine")


def save(make_writer: MakeWriter, state: dict[str, Any], ranks: int = 1) -> None:
    """A save that succeeds."""
    save_by_hand([SavingRank(make_writer(), state, rank=rank) for rank in range(ranks)])


def check_stored(make_reader: MakeReader, wanted: dict[str, Any]) -> None:
    """Assert that a reader gets ``wanted``."""
    rank = LoadingRank(make_reader(), empty_state())
    load_by_hand([rank])
    compare(rank.state, wanted)


def is_there(make_reader: MakeReader) -> bool:
    """Whether a reader finds a checkpoint."""
    reader = make_reader()
    try:
        reader.reset()
        reader.read_metadata()
    except Exception:  # a reader of another origin may raise whatever it likes
        return False
    return True
