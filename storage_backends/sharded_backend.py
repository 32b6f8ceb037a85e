"""A backend from a byte store alone: the engine's format comes with it.

Belongs here: ``ShardedBackend``, the base class for whoever has a ``ByteStore``.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from dcp_engine.registry import Backend
from dcp_engine.storage import StorageReader, StorageWriter
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter

__all__ = ["ShardedBackend"]


class ShardedBackend(Backend):
    """Implement ``open_store``; writer and reader come for free.

    Options that the writer or the reader does not know go to ``open_store``.
    """

    def writer(self, checkpoint_id: str | os.PathLike[str], **options: Any) -> StorageWriter:
        """A ``ShardedWriter``; see there for its options."""
        own, rest = _split(options, ShardedWriter.OPTIONS)
        return ShardedWriter(partial(self.open_store, **rest), checkpoint_id, **own)

    def reader(self, checkpoint_id: str | os.PathLike[str], **options: Any) -> StorageReader:
        """A ``ShardedReader``; see there for its options."""
        own, rest = _split(options, ShardedReader.OPTIONS)
        return ShardedReader(partial(self.open_store, **rest), checkpoint_id, **own)


def _split(options: dict[str, Any], known: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {name: value for name, value in options.items() if name in known}
    rest = {name: value for name, value in options.items() if name not in known}
    return own, rest
