"""Checkpoints of dcp_engine in a SQLite database: ``sqlite:///path/of/the.db`` is one checkpoint.

An example of a storage backend as a package of its own. ``SQLiteStore`` moves bytes;
``SQLiteBackend`` is what the entry point names. Format, digests, commit, resharding and async
saves come from dcp_engine.
"""

from dcp_engine_sqlite.backend import SQLiteBackend
from dcp_engine_sqlite.store import SQLiteStore

__all__ = ["SQLiteBackend", "SQLiteStore"]
