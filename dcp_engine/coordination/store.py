"""A session over a c10d store.

Belongs here: ``StoreSession``: its connections, its numbers, its prefix. Does not belong here:
finding the store (``group``), the handshake, what an operation does.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch.distributed

from dcp_engine.coordination.handshake import agree_on_session
from dcp_engine.coordination.interface import Deadlines, RunIdentity, Session
from dcp_engine.coordination.keys import group_prefix, session_prefix
from dcp_engine.coordination.messages import Heading
from dcp_engine.coordination.operation import StoreOperation
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.store_client import KeyValueStore, StoreClient, StoreCounters
from dcp_engine.coordination.watched import run_watched
from dcp_engine.errors import UsageError

__all__ = ["StoreSession"]

_distributed: Any = torch.distributed
"""The store classes, which torch's type stubs know only in part."""


class StoreSession(Session):
    """The ranks of a group, over the store they share. Made by ``StoreSession.open``.

    Each operation that runs has a connection of its own; when it ends, the next one gets it. A
    rank that runs one operation at a time has one connection.

    Args:
        connect: opens a new connection to the store.
        location: where the store is, for messages.
        name: what the ranks agreed on.
    """

    def __init__(
        self,
        connect: Callable[[], KeyValueStore],
        *,
        location: str,
        rank: int,
        world_size: int,
        identity: RunIdentity,
        name: str,
        rhythm: Rhythm,
        first: StoreClient,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.identity = identity
        self.name = name
        self._connect = connect
        self._location = location
        self._rhythm = rhythm
        self._lock = threading.Lock()
        self._idle: list[StoreClient] = [first]
        self._clients: list[StoreClient] = [first]
        self._next = 0
        self._closed = False

    @classmethod
    def open(
        cls,
        connect: Callable[[], KeyValueStore],
        *,
        location: str,
        rank: int,
        world_size: int,
        identity: RunIdentity,
        timeout: float = 300.0,
        rhythm: Rhythm | None = None,
    ) -> StoreSession:
        """Meet the other ranks of ``identity.group``. All of them have to call this.

        Args:
            connect: opens a new connection to the store; called once now.
            location: where the store is, for messages (``host:port``).
            rank: rank in the group.
            timeout: seconds to wait for the others.

        Raises:
            CoordinationError: kind ``timeout`` naming the ranks that did not come, or
                ``store_lost``.
        """

        def meet() -> tuple[StoreClient, str]:
            client = StoreClient(connect(), location, patience=timeout)
            name = agree_on_session(
                client,
                group_prefix(identity.group),
                rank=rank,
                world_size=world_size,
                host=identity.host,
                timeout=timeout,
            )
            return client, name

        # One timeout for the leader to come, one for its verdict, one for the store to answer.
        first, name = run_watched(meet, 3 * timeout, location)
        return cls(
            connect,
            location=location,
            rank=rank,
            world_size=world_size,
            identity=identity,
            name=name,
            rhythm=rhythm or Rhythm.for_world(world_size),
            first=first,
        )

    def prefix(self, generation: int = 0) -> str:
        """Under which all keys of one generation live. Generation 0 is the session's own;
        others are for process groups that the ranks make beside it."""
        return session_prefix(self.identity.group, self.name, generation)

    def connect(self) -> KeyValueStore:
        """A new connection to the session's store, which the caller owns."""
        self._refuse_if_closed()
        return self._connect()

    def data_store(self, number: int) -> Any:
        """A store for a process group of operation ``number``; see the interface."""
        store: Any = self.connect()
        if not isinstance(store, _distributed.Store):
            return None
        return _distributed.PrefixStore(f"{self.prefix()}/{number}/data", store)

    @property
    def counters(self) -> StoreCounters:
        """What this rank asked of the store so far."""
        with self._lock:
            clients = list(self._clients)
        calls: Counter[str] = Counter()
        for client in clients:
            calls.update(dict(client.calls))
        return StoreCounters(
            calls=dict(calls),
            bytes_out=sum(client.bytes_out for client in clients),
            bytes_in=sum(client.bytes_in for client in clients),
            connections=len(clients),
        )

    def begin(
        self,
        kind: Literal["save", "load"],
        checkpoint_id: str,
        *,
        deadlines: Deadlines,
        coordinator_rank: int = 0,
    ) -> StoreOperation:
        """Take the next number; see the interface."""
        self._refuse_if_closed()
        if not 0 <= coordinator_rank < self.world_size:
            raise UsageError(
                f"coordinator_rank is {coordinator_rank}, but the group has ranks 0 to "
                f"{self.world_size - 1}",
                checkpoint=checkpoint_id,
            )
        with self._lock:
            number, self._next = self._next, self._next + 1
        return StoreOperation(
            Heading(
                number=number,
                kind=kind,
                checkpoint=checkpoint_id,
                coordinator=coordinator_rank,
            ),
            rank=self.rank,
            world_size=self.world_size,
            prefix=f"{self.prefix()}/{number}",
            deadlines=deadlines,
            rhythm=self._rhythm,
            connect=self._lend,
            give_back=self._take_back,
        )

    def close(self) -> None:
        """Drop the idle connections; those in use are dropped when their operation ends."""
        with self._lock:
            self._closed = True
            self._idle.clear()

    def _lend(self) -> StoreClient:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        client = StoreClient(self._connect(), self._location)
        with self._lock:
            self._clients.append(client)
        return client

    def _take_back(self, client: StoreClient) -> None:
        with self._lock:
            if client.lost is None and not self._closed:
                self._idle.append(client)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError("the session is closed")
