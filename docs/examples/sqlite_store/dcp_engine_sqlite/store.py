"""A byte store in one SQLite database.

A file is a row of ``files`` and its bytes are rows of ``parts``, a mebibyte each at most. Every
call opens a connection of its own, so that threads and processes share nothing but the database;
SQLite lets one of them write at a time.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager

from dcp_engine.errors import StorageError
from dcp_engine.storage import Buffer, ByteStore, ByteStoreFile, ReadRange, StoredFile
from storage_backends.names import split_name

__all__ = ["SQLiteStore"]

PART = 1 << 20
"""Bytes of a row: a read loads the rows that it touches."""

_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    changed REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS parts (
    file INTEGER NOT NULL,
    start INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (file, start)
) WITHOUT ROWID;
"""


class SQLiteStore(ByteStore):
    """Bytes under names in the database at ``path``.

    Args:
        path: of the database; ``make_directory`` creates it.
        busy_timeout: seconds to wait while others write.
    """

    random_write = False  # parts are appended
    atomic_replace = True  # renaming is one transaction
    create_if_absent = True  # names are unique
    durable_sync = True  # each transaction is on disk when it is committed
    shared_between_processes = True

    def __init__(self, path: str, *, busy_timeout: float = 60.0) -> None:
        self._path = os.path.abspath(path)
        self._busy_timeout = busy_timeout

    @property
    def url(self) -> str:
        return f"sqlite://{self._path}"

    @contextmanager
    def _connection(
        self, name: str, action: str, *, create: bool = False
    ) -> Iterator[sqlite3.Connection]:
        """One transaction, taken back if the body raises."""
        if not create and not os.path.exists(self._path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{name}")
        try:
            with closing(
                sqlite3.connect(self._path, timeout=self._busy_timeout, isolation_level=None)
            ) as connection:
                connection.execute("PRAGMA synchronous = EXTRA")
                if create:
                    connection.executescript(_TABLES)
                # Takes the lock at once: two that read first and then write would block each other.
                connection.execute("BEGIN IMMEDIATE" if action != "read the file" else "BEGIN")
                try:
                    yield connection
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
            raise StorageError(
                f"could not {action}: {error}",
                kind="disk_full" if full else "io_error",
                checkpoint=self.url,
                file=name,
            ) from error

    def _find(self, connection: sqlite3.Connection, name: str) -> tuple[int, int]:
        """Number and size of file ``name``."""
        split_name(name, store=self.url)
        found = connection.execute("SELECT id, size FROM files WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{name}")
        return found[0], found[1]

    def _insert(self, connection: sqlite3.Connection, name: str) -> int:
        """The number of a new, empty file."""
        split_name(name, store=self.url)
        try:
            connection.execute(
                "INSERT INTO files (name, size, changed) VALUES (?, 0, ?)", (name, time.time())
            )
        except sqlite3.IntegrityError:
            raise FileExistsError(
                errno.EEXIST, os.strerror(errno.EEXIST), f"{self.url}/{name}"
            ) from None
        return self._find(connection, name)[0]

    def _append(
        self, connection: sqlite3.Connection, file: int, buffers: Sequence[Buffer], start: int
    ) -> int:
        """Put ``buffers`` behind byte ``start``; returns where they end."""
        for buffer in buffers:
            for begin in range(0, buffer.nbytes, PART):
                part = buffer[begin : begin + PART]
                connection.execute("INSERT INTO parts VALUES (?, ?, ?)", (file, start, part))
                start += part.nbytes
        connection.execute(
            "UPDATE files SET size = ?, changed = ? WHERE id = ?", (start, time.time(), file)
        )
        return start

    def _remove(self, connection: sqlite3.Connection, name: str) -> None:
        found = connection.execute("SELECT id FROM files WHERE name = ?", (name,)).fetchone()
        if found is not None:
            connection.execute("DELETE FROM parts WHERE file = ?", found)
            connection.execute("DELETE FROM files WHERE id = ?", found)

    def make_directory(self, name: str) -> None:
        """Creates the database; there are no directories in it."""
        split_name(name, store=self.url)
        if not os.path.exists(self._path):
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            with self._connection(name, "create the database", create=True):
                pass

    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        with self._connection(name, "create the file") as connection:
            return _SQLiteFile(self, name, self._insert(connection, name))

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        with self._connection(name, "write the file") as connection:
            if not if_absent:
                self._remove(connection, name)
            file = self._insert(connection, name)
            self._append(connection, file, [memoryview(data)], 0)

    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        with self._connection(name, "read the file") as connection:
            file, size = self._find(connection, name)
            for item in ranges:
                end = item.offset + item.buffer.nbytes
                if end > size:
                    raise EOFError(f"{self.url}/{name} ends before byte {end}")
                # The last row that begins at or before the range, and those behind it.
                rows = connection.execute(
                    "SELECT start, data FROM parts WHERE file = ? AND start < ? AND start >= "
                    "(SELECT max(start) FROM parts WHERE file = ? AND start <= ?) ORDER BY start",
                    (file, end, file, item.offset),
                )
                for start, data in rows:
                    begin = max(start, item.offset)
                    stop = min(start + len(data), end)
                    part = memoryview(data)[begin - start : stop - start]
                    item.buffer[begin - item.offset : stop - item.offset] = part

    def size(self, name: str) -> int:
        with self._connection(name, "read the file") as connection:
            return self._find(connection, name)[1]

    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        if not os.path.exists(self._path):
            return []
        with self._connection(prefix, "read the file") as connection:
            rows = connection.execute(
                "SELECT name, size, changed FROM files WHERE substr(name, 1, ?) = ?",
                (len(prefix), prefix),
            )
            now = time.time()
            return [StoredFile(name, size, max(0.0, now - changed)) for name, size, changed in rows]

    def replace(self, source: str, target: str) -> None:
        split_name(target, store=self.url)
        with self._connection(target, "rename the file") as connection:
            file, _ = self._find(connection, source)
            if source != target:
                self._remove(connection, target)
            connection.execute("UPDATE files SET name = ? WHERE id = ?", (target, file))

    def delete(self, names: Iterable[str]) -> None:
        wanted = list(names)
        for name in wanted:
            split_name(name.removesuffix("/"), store=self.url)
        if wanted and os.path.exists(self._path):
            with self._connection(wanted[0], "remove the file") as connection:
                for name in wanted:
                    self._remove(connection, name)

    def sync_directory(self, name: str) -> None:
        """Nothing to do: every transaction is on disk already."""
        split_name(name, store=self.url)


class _SQLiteFile(ByteStoreFile):
    """Under its name from the begin, as in a file system; complete when it is closed."""

    def __init__(self, store: SQLiteStore, name: str, file: int) -> None:
        self._store = store
        self._name = name
        self._file = file
        self._end = 0
        self._is_open = True
        self._lock = threading.Lock()

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        with self._lock:
            if not self._is_open:
                raise self._error("the file is closed already")
            if offset != self._end:
                raise self._error(f"the next byte is {self._end}, not {offset}")
            with self._store._connection(self._name, "write the file") as connection:
                file, _ = self._store._find(connection, self._name)
                if file != self._file:
                    raise self._error("the file was replaced while it was written")
                self._end = self._store._append(connection, file, buffers, offset)

    def _error(self, message: str) -> StorageError:
        return StorageError(message, checkpoint=self._store.url, file=self._name)

    def sync(self) -> None:
        """Nothing to do: every transaction is on disk already."""

    def close(self) -> None:
        self._is_open = False

    def abort(self) -> None:
        self._is_open = False
        self._store.delete([self._name])
