"""A session over a c10d store.

Belongs here: ``StoreSession``: its connections, its numbers, its prefix. Does not belong here:
finding the store (``group``), the handshake, what an operation does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed

from dcp_engine.coordination.address import StoreAddress, without_prefix
from dcp_engine.coordination.address import connect as connect_to
from dcp_engine.coordination.death import remove_remains, report_death
from dcp_engine.coordination.failures import capture
from dcp_engine.coordination.handshake import agree_on_session
from dcp_engine.coordination.identity import identity_here
from dcp_engine.coordination.interface import (
    Deadlines,
    DeathVerdict,
    OperationKind,
    RunIdentity,
    Session,
    SessionHandle,
)
from dcp_engine.coordination.keys import OperationKeys, group_prefix, session_prefix
from dcp_engine.coordination.limits import LimitKeeper
from dcp_engine.coordination.messages import Heading
from dcp_engine.coordination.numbers import Numbers
from dcp_engine.coordination.operation import StoreOperation
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.store_client import KeyValueStore, StoreClient, StoreCounters
from dcp_engine.coordination.watched import run_watched
from dcp_engine.errors import UsageError

__all__ = ["StoreSession", "StoreSessionHandle"]

_distributed: Any = torch.distributed
"""The store classes, which torch's type stubs know only in part."""
_Result = TypeVar("_Result")
_DEATH_PATIENCE = 30.0
"""Seconds that the store has for the messages of a dead worker's parent."""


@dataclass(frozen=True, kw_only=True)
class StoreSessionHandle(SessionHandle):
    """A session over a store, on its way to another process."""

    address: StoreAddress
    rank: int
    world_size: int
    identity: RunIdentity
    name: str
    rhythm: Rhythm

    def prefix(self, generation: int = 0) -> str:
        """As ``StoreSession.prefix``."""
        return session_prefix(self.identity.group, self.name, generation)

    def attach(self) -> StoreSession:
        """The same session here; see the interface."""
        return StoreSession.attach(
            self.address,
            rank=self.rank,
            world_size=self.world_size,
            identity=identity_here(self.identity),
            name=self.name,
            rhythm=self.rhythm,
        )


class StoreSession(Session):
    """The ranks of a group, over the store they share. Made by ``StoreSession.open``.

    Each operation that runs has a connection of its own; when it ends, the next one gets it. A
    rank that runs one operation at a time has one connection.

    Args:
        connect: opens a new connection to the store.
        location: where the store is, for messages.
        address: where another process finds the store; None if it cannot.
        name: what the ranks agreed on.
        numbers: whence its operations have their numbers.
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
        address: StoreAddress | None = None,
        first: StoreClient | None = None,
        numbers: Numbers | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.identity = identity
        self.name = name
        self._connect = connect
        self._location = location
        self._rhythm = rhythm
        self._lock = threading.Lock()
        self._address = address
        self._idle: list[StoreClient] = [] if first is None else [first]
        self._clients: list[StoreClient] = list(self._idle)
        self._dropped = StoreCounters()
        self._numbers = Numbers() if numbers is None else numbers
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
        address: StoreAddress | None = None,
        timeout: float = 300.0,
        rhythm: Rhythm | None = None,
    ) -> StoreSession:
        """Meet the other ranks of ``identity.group``. All of them have to call this.

        Args:
            connect: opens a new connection to the store; called once now.
            location: where the store is, for messages (``host:port``).
            rank: rank in the group.
            address: where another process finds the store, if it can.
            timeout: seconds to wait for the others.

        Raises:
            CoordinationError: kind ``timeout`` naming the ranks that did not come, or
                ``store_lost``.
        """

        if address is None or address.kind == "memory":
            address, view = None, connect
        else:
            # Nobody can ask a PrefixStore for its prefix, so a worker could not follow there. It
            # is not needed: two sessions never have one name.
            def view() -> KeyValueStore:
                return cast(KeyValueStore, without_prefix(connect()))

        def new_client() -> StoreClient:
            return StoreClient(connect(), location, patience=timeout)

        limits = LimitKeeper(new_client)
        clients: list[StoreClient] = []

        def meet() -> tuple[StoreClient, str]:
            store = connect()
            client = StoreClient(store, location, patience=timeout)
            clients.append(client)
            name = agree_on_session(
                client,
                group_prefix(identity.group),
                rank=rank,
                world_size=world_size,
                host=identity.host,
                timeout=timeout,
            )
            if address is not None:
                client.move_to(without_prefix(store))
            return client, name

        # One timeout for the leader to come, one for its verdict, one for the store to answer.
        first, name = run_watched(
            meet,
            3 * timeout,
            location,
            lambda: limits.look(clients[0].limit if clients else None),
        )
        return cls(
            view,
            location=location,
            rank=rank,
            world_size=world_size,
            identity=identity,
            name=name,
            rhythm=rhythm or Rhythm.for_world(world_size),
            address=address,
            first=first,
        )

    @classmethod
    def attach(
        cls,
        address: StoreAddress,
        *,
        rank: int,
        world_size: int,
        identity: RunIdentity,
        name: str,
        rhythm: Rhythm | None = None,
    ) -> StoreSession:
        """Stand for a rank of a session that another process has opened: no handshake, nothing is
        sent, and a connection is made when the first operation needs one.

        Args:
            identity: of the calling process; its group is the session's.
            name: what the ranks agreed on.
        """
        return cls(
            lambda: cast(KeyValueStore, connect_to(address)),
            location=str(address),
            rank=rank,
            world_size=world_size,
            identity=identity,
            name=name,
            rhythm=rhythm or Rhythm.for_world(world_size),
            address=address,
            numbers=Numbers(borrowed=True),
        )

    @property
    def address(self) -> StoreAddress:
        """Where another process finds the session's store.

        Raises:
            UsageError: it lies in the memory of this process.
        """
        if self._address is None:
            raise UsageError(
                f"the store of this session ({self._location}) cannot be reached from another "
                "process",
                hint="initialize the process group with a TCPStore or a FileStore, or save with "
                "threads instead of a worker process",
            )
        return self._address

    def handle(self) -> StoreSessionHandle:
        """What another process needs to go on with this session; see the interface."""
        return StoreSessionHandle(
            address=self.address,
            rank=self.rank,
            world_size=self.world_size,
            identity=self.identity,
            name=self.name,
            rhythm=self._rhythm,
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
            return sum((client.counters for client in self._clients), self._dropped)

    def begin(
        self,
        kind: OperationKind,
        checkpoint_id: str,
        *,
        deadlines: Deadlines,
        coordinator_rank: int = 0,
        number: int | None = None,
    ) -> StoreOperation:
        """Take the next number; see the interface."""
        self._refuse_if_closed()
        if not 0 <= coordinator_rank < self.world_size:
            raise UsageError(
                f"coordinator_rank is {coordinator_rank}, but the group has ranks 0 to "
                f"{self.world_size - 1}",
                checkpoint=checkpoint_id,
            )
        number = self._numbers.given(number)
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
            drop=self._drop,
        )

    def take_number(self) -> int:
        """The next number; see the interface."""
        return self._numbers.take()

    def report_death(
        self,
        number: int,
        *,
        coordinator_rank: int,
        error: BaseException,
        checkpoint: str | None = None,
    ) -> DeathVerdict:
        """Fail operation ``number`` for all ranks; see the interface."""
        record = capture(self.rank, error)
        return self._say(
            number,
            lambda client, keys: report_death(
                client,
                keys,
                record,
                coordinator=coordinator_rank,
                world_size=self.world_size,
                checkpoint=checkpoint,
                patience=self._rhythm.slack,
            ),
        )

    def remove_remains(self, number: int) -> None:
        """Remove what is left of operation ``number``; see the interface."""
        self._say(
            number,
            lambda client, keys: remove_remains(
                client, keys, rank=self.rank, world_size=self.world_size
            ),
        )

    def _say(self, number: int, say: Callable[[StoreClient, OperationKeys], _Result]) -> _Result:
        """Have something to say in operation ``number`` for a process that is dead."""
        self._refuse_if_closed()

        def run() -> _Result:
            client = self._lend()
            client.patience = _DEATH_PATIENCE
            try:
                return say(client, OperationKeys(f"{self.prefix()}/{number}"))
            finally:
                self._take_back(client)

        return run_watched(run, 2 * _DEATH_PATIENCE, self._location)

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

    def _drop(self, client: StoreClient) -> None:
        """Let the connection go, but not what it counted."""
        with self._lock:
            self._clients.remove(client)
            self._dropped += client.counters

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError("the session is closed")
