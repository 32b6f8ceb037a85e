"""From a URL to a store."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote, urlsplit

from dcp_engine.errors import UsageError
from dcp_engine.storage import ByteStore
from dcp_engine_sqlite.store import SQLiteStore
from storage_backends.sharded_backend import ShardedBackend

__all__ = ["SQLiteBackend"]


class SQLiteBackend(ShardedBackend):
    """``sqlite:///absolute/path.db``. Writer and reader are ``ShardedBackend``'s."""

    def open_store(self, url: str | os.PathLike[str], **options: Any) -> ByteStore:
        """The database at ``url``. Option: ``busy_timeout``, seconds to wait for other writers."""
        unknown = options.keys() - {"busy_timeout"}
        if unknown:
            raise UsageError(f"sqlite: does not know options {sorted(unknown)}", checkpoint=url)
        parts = urlsplit(os.fspath(url))
        if parts.netloc or not parts.path.startswith("/"):
            raise UsageError(
                f"{url!r} is not the URL of a SQLite database",
                checkpoint=url,
                hint="write sqlite:///absolute/path.db, with three slashes",
            )
        return SQLiteStore(unquote(parts.path), **options)
