"""Where a store is, so that another process can connect to it.

Belongs here: addresses and connecting. Does not belong here: finding the job's store (``group``).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from dcp_engine.errors import CoordinationError

__all__ = ["StoreAddress", "address_of", "connect", "lost_store", "without_prefix"]

_stores: Any = dist
"""The store classes, which torch's type stubs know only in part."""


@dataclass(frozen=True, kw_only=True)
class StoreAddress:
    """Where a store is, without any prefix."""

    kind: Literal["tcp", "file", "memory"]
    """``memory``: in no place that another process could reach. It serves one rank, and whoever
    connects gets an empty store of its own."""
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.kind == "tcp":
            return f"{self.host}:{self.port}"
        return self.path if self.kind == "file" else "memory"


def address_of(store: Any) -> StoreAddress | None:
    """Where ``store`` is, prefixes left out; None for a kind that is not known.

    ``MASTER_ADDR`` is not asked: it may be unset, or belong to another store.
    """
    store = without_prefix(store)
    if isinstance(store, _stores.TCPStore):
        return StoreAddress(kind="tcp", host=store.host, port=store.port)
    if isinstance(store, _stores.FileStore):
        return StoreAddress(kind="file", path=str(store.path))
    if isinstance(store, _stores.HashStore):
        return StoreAddress(kind="memory")
    return None


def without_prefix(store: Any) -> Any:
    """The same connection, its keys as the store itself holds them."""
    while isinstance(store, _stores.PrefixStore):
        store = store.underlying_store
    return store


def connect(address: StoreAddress, timeout: float = 60.0) -> Any:
    """A c10d store at ``address``, as a client of one's own.

    Args:
        timeout: seconds to connect, and for a wait to which no other limit is given.

    Raises:
        CoordinationError: kind ``store_lost``.
    """
    limit = timedelta(seconds=timeout)
    try:
        if address.kind == "tcp":
            return _stores.TCPStore(
                address.host, address.port, None, False, timeout=limit, wait_for_workers=False
            )
        # Without a number of users, so that a worker that leaves never counts as the last one,
        # who removes the file.
        store = _stores.FileStore(address.path) if address.kind == "file" else _stores.HashStore()
        store.set_timeout(limit)
    except RuntimeError as error:  # all errors of c10d stores are
        raise lost_store(address, error) from None
    return store


def lost_store(address: StoreAddress, error: RuntimeError) -> CoordinationError:
    """What to raise for an error of the store at ``address``."""
    reason = str(error).split("Exception raised from", 1)[0].strip()
    return CoordinationError(
        f"the store at {address} cannot be reached: {reason}",
        kind="store_lost",
        hint="the process that hosts the store, or the way to it, is gone; restart the job",
    )
