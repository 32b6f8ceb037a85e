"""dcp_engine's kit over the SQLite store: all that a backend's tests have to be."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from dcp_engine_sqlite import SQLiteStore

from dcp_engine.registry import BackendRegistry
from dcp_engine.storage import ByteStore, StorageReader, StorageWriter
from storage_backends.testing import (
    ByteStoreContract,
    Medium,
    StorageReaderContract,
    StorageWriterContract,
)


class DatabaseMedium(Medium):
    """The rows, by SQL of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _rows(self, sql: str, *values: object) -> list[tuple]:
        if not self._path.exists():
            return []
        with closing(sqlite3.connect(self._path)) as connection, connection:
            return connection.execute(sql, values).fetchall()

    def read(self, name: str) -> bytes:
        # In one statement, so that all of it is of one moment.
        rows = self._rows(
            "SELECT data FROM files LEFT JOIN parts ON file = id WHERE name = ? ORDER BY start",
            name,
        )
        if not rows:
            raise FileNotFoundError(name)
        return b"".join(data for (data,) in rows if data is not None)

    def write(self, name: str, data: bytes) -> None:
        self._rows("DELETE FROM parts WHERE file = (SELECT id FROM files WHERE name = ?)", name)
        self._rows("INSERT OR IGNORE INTO files (name, size, changed) VALUES (?, 0, 0)", name)
        now = (len(data), time.time(), name)
        self._rows("UPDATE files SET size = ?, changed = ? WHERE name = ?", *now)
        if data:
            self._rows("INSERT INTO parts SELECT id, 0, ? FROM files WHERE name = ?", data, name)

    def names(self) -> set[str]:
        orphans = self._rows("SELECT file FROM parts WHERE file NOT IN (SELECT id FROM files)")
        names = {name for (name,) in self._rows("SELECT name FROM files")}
        return names | {f"orphaned part of file {file}" for (file,) in orphans}


class TestSQLiteStore(ByteStoreContract):
    MANY_FILES = 200  # each is three transactions here
    ROUNDS = 10

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], ByteStore]:
        return lambda: SQLiteStore(str(tmp_path / "c.db"))

    @pytest.fixture
    def medium(self, tmp_path: Path) -> Medium:
        return DatabaseMedium(tmp_path / "c.db")

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite://{tmp_path}/c.db"


class TestSQLiteCheckpoints(StorageWriterContract, StorageReaderContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return f"sqlite://{tmp_path}/c.db"

    @pytest.fixture
    def other_place(self, tmp_path: Path) -> str:
        return f"sqlite://{tmp_path}/other.db"

    @pytest.fixture
    def make_writer(self, place: str) -> Callable[[], StorageWriter]:
        return lambda: BackendRegistry().writer(place)

    @pytest.fixture
    def make_reader(self, place: str) -> Callable[[], StorageReader]:
        return lambda: BackendRegistry().reader(place)

    @pytest.fixture
    def medium(self, tmp_path: Path) -> Medium:
        return DatabaseMedium(tmp_path / "c.db")
