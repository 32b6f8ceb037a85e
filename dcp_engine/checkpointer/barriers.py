"""Barriers: points that no rank passes before all have come.

Belongs here: the interface, its registry, and the two barriers that the engine brings, both over
the machinery of ``coordination``: with a deadline, and missing ranks by name. Does not belong
here: how ranks meet.

A writer over several ranks needs no barrier beside its commit, which no rank leaves before all
have written. What it takes from a barrier is the way to the other ranks (``Barrier.session``).
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed

from dcp_engine.checkpointer.types import RankInfo
from dcp_engine.closing import Closing
from dcp_engine.coordination.address import StoreAddress, connect
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Deadlines, Decision, Session
from dcp_engine.coordination.numbers import Numbers
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.single import SingleSession
from dcp_engine.coordination.store import StoreSession
from dcp_engine.errors import CoordinationError, UsageError

__all__ = [
    "Barrier",
    "BarrierConfig",
    "DistBarrier",
    "TCPStoreBarrier",
    "barrier_class",
    "create_barrier_from_config",
    "register_barrier",
]

_REGISTERED = "_dcp_engine_registered_barrier"
_distributed: Any = torch.distributed
"""The store classes, which torch's type stubs know only in part."""


class Barrier(Closing):
    """A barrier among ranks. A context manager.

    Derive from it, override ``execute_barrier``, and give the class a ``barrier_type`` and the
    decorator ``register_barrier`` to have it made from a ``BarrierConfig``.
    """

    barrier_type: str
    """The name under which ``BarrierConfig`` asks for it."""
    waits_at_commit = False
    """Whether a writer may leave ``execute_barrier`` out, because its commit is one among the
    same ranks."""

    def __init__(self, **kwargs: Any) -> None:
        """``kwargs`` are the subclass's own."""

    @classmethod
    def from_config(cls, barrier_args: Mapping[str, Any], rank_info: RankInfo | None) -> Barrier:
        """Make one. A subclass that is to be told its rank takes it from ``rank_info`` here."""
        return cls(**barrier_args)

    @abc.abstractmethod
    def execute_barrier(self) -> None:
        """Return when all ranks have called this."""

    def session(self) -> Session | None:
        """A session among the same ranks, the caller's to close, over which a writer can commit;
        None (the default) where the barrier knows no other way than itself. Operations begin with
        numbers that the caller counts (``Session.begin(number=...)``)."""
        return None

    def close(self) -> None:
        """Release what is held. May be called twice."""


_Class = TypeVar("_Class", bound=type[Barrier])


def register_barrier(barrier_class: _Class) -> _Class:
    """Decorator: let ``BarrierConfig`` find the class by its ``barrier_type``.

    Raises ``UsageError`` for what is no ``Barrier`` or has no ``barrier_type``.
    """
    if not (isinstance(barrier_class, type) and issubclass(barrier_class, Barrier)):
        raise UsageError(
            f"{barrier_class!r} is not a dcp_engine.Barrier",
            hint="derive it from dcp_engine.Barrier",
        )
    if not isinstance(getattr(barrier_class, "barrier_type", None), str):
        raise UsageError(
            f"{barrier_class.__name__} has no barrier_type",
            hint='give the class an attribute barrier_type = "..."',
        )
    setattr(barrier_class, _REGISTERED, barrier_class)
    return barrier_class


@dataclass
class BarrierConfig:
    """Which barrier, and what it is made with.

    Example, on rank 2 of 4::

        BarrierConfig(
            barrier_type="tcp_store",
            barrier_args={
                "barrier_prefix": "checkpoint",
                "timeout_barrier_init_secs": 30,
                "use_checkpoint_barrier_tcpstore_libuv": True,
                "tcpstore_port": 12345,
                "master_address": "node-0",
                "timeout_secs": 600,
            },
        )
    """

    barrier_type: str | None = None
    """``"tcp_store"``, ``"dist_barrier"``, or that of a class of your own (``register_barrier``);
    None for no barrier."""
    barrier_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class. The ranks of a ``"tcp_store"`` need not be among them where the
    rank is known anyhow."""


def create_barrier_from_config(
    barrier_config: BarrierConfig, rank_info: RankInfo | None = None
) -> Barrier | None:
    """The barrier that ``barrier_config`` describes; None if it describes none.

    Args:
        rank_info: for barriers that have to know their rank and were not told by ``barrier_args``.

    Raises:
        UsageError: (a ``ValueError``) no class is registered under this ``barrier_type``.
    """
    if barrier_config.barrier_type is None:
        return None
    found = barrier_class(barrier_config.barrier_type)
    return found.from_config(barrier_config.barrier_args, rank_info)


def barrier_class(barrier_type: str) -> type[Barrier]:
    """The class that was registered (last) under ``barrier_type``; raises ``UsageError``."""
    known = {found.barrier_type: found for found in _registered(Barrier)}
    if barrier_type not in known:
        raise UsageError(
            f"unknown barrier type {barrier_type!r}; registered are {', '.join(sorted(known))}",
            hint="import the module that defines it, and decorate the class with register_barrier",
        )
    return known[barrier_type]


def _registered(above: type[Any]) -> Iterator[type[Barrier]]:
    """Registered classes in the order of their definition. The classes themselves are the
    registry: there is no list that could disagree with them."""
    for below in above.__subclasses__():
        if vars(below).get(_REGISTERED) is below:
            yield below
        yield from _registered(below)


@register_barrier
class DistBarrier(Barrier):
    """A barrier among all ranks of ``torch.distributed``, over its store: no collective runs, and
    no device is used.

    Args:
        timeout_secs: seconds to wait for all ranks.

    Raises:
        UsageError: ``torch.distributed`` is not initialized.
    """

    barrier_type = "dist_barrier"
    waits_at_commit = True

    def __init__(self, timeout_secs: float = 1800.0) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise UsageError(
                "DistBarrier needs an initialized process group",
                hint='call init_process_group first, or use barrier_type="tcp_store"',
            )
        self._timeout = timeout_secs
        self._session: Session | None = None

    def execute_barrier(self) -> None:
        """Return when all ranks have called this.

        Raises:
            CheckpointException: kind ``timeout``, naming the missing ranks, or ``store_lost``.
            CoordinationError: kind ``timeout``: they are missing from the very first barrier.
        """
        if self._session is None:
            self._session = open_session(connect_timeout=self._timeout)
        _meet(self._session, "torch.distributed", self._timeout, None)

    def close(self) -> None:
        """Close the connection to the store."""
        if self._session is not None:
            self._session.close()
            self._session = None


@register_barrier
class TCPStoreBarrier(Barrier):
    """A barrier over a TCP store of its own, which the process of rank 0 hosts: it needs no
    process group, and so suits the processes that write checkpoints.

    A process that takes the place of one that died may make its barrier anew; for barriers (not
    for writes) it then counts from 0 again, and the others have to, too.

    Args:
        global_rank, global_world_size: this process among those that meet.
        barrier_prefix: name of the barrier; barriers of several names may share a store.
        timeout_barrier_init_secs: seconds to reach the store.
        use_checkpoint_barrier_tcpstore_libuv: host the store with libuv.
        tcpstore_port, master_address: where rank 0 hosts the store.
        timeout_secs: seconds to wait for all ranks.

    Raises:
        CoordinationError: kind ``store_lost``: the store cannot be hosted there, or not reached.
    """

    barrier_type = "tcp_store"
    waits_at_commit = True

    def __init__(
        self,
        global_rank: int,
        global_world_size: int,
        barrier_prefix: str,
        timeout_barrier_init_secs: float,
        use_checkpoint_barrier_tcpstore_libuv: bool,
        tcpstore_port: int,
        master_address: str,
        timeout_secs: float,
    ) -> None:
        self._rank = RankInfo(global_rank=global_rank, global_world_size=global_world_size)
        self._prefix = barrier_prefix
        self._timeout = timeout_secs
        self._barriers = 0
        self._address = StoreAddress(kind="tcp", host=master_address, port=int(tcpstore_port))
        self._server: Any = None
        if global_rank == 0:
            self._server = _host(
                self._address, timeout_barrier_init_secs, use_checkpoint_barrier_tcpstore_libuv
            )
        else:
            connect(self._address, timeout_barrier_init_secs)  # finds out whether it is there
        self._meeting = self._attach("barriers")

    @classmethod
    def from_config(cls, barrier_args: Mapping[str, Any], rank_info: RankInfo | None) -> Barrier:
        """The rank is ``rank_info`` where ``barrier_args`` do not tell it."""
        if rank_info is None:
            return cls(**barrier_args)
        told = {
            "global_rank": rank_info.global_rank,
            "global_world_size": rank_info.global_world_size,
        }
        return cls(**{**told, **barrier_args})

    def execute_barrier(self) -> None:
        """Return when all ranks have called this as often.

        Raises:
            CheckpointException: kind ``timeout``, naming the missing ranks, or ``store_lost``.
        """
        number, self._barriers = self._barriers, self._barriers + 1
        _meet(self._meeting, self._prefix, self._timeout, number)

    def session(self) -> Session:
        """A session over the barrier's store; see the base class."""
        return self._attach("writes")

    def close(self) -> None:
        """Drop the connections; on rank 0 this ends the store."""
        self._meeting.close()
        self._server = None

    def _attach(self, name: str) -> Session:
        identity = run_identity(f"checkpointer/{self._prefix}")
        if self._rank.global_world_size == 1:
            return SingleSession(identity, numbers=Numbers(borrowed=True))
        # Nobody has to agree on a name: the store is the barrier's own, and as young.
        return StoreSession.attach(
            self._address,
            rank=self._rank.global_rank,
            world_size=self._rank.global_world_size,
            identity=identity,
            name=name,
        )


def _meet(session: Session, name: str, timeout: float, number: int | None) -> None:
    with session.begin(
        "barrier",
        name,
        deadlines=Deadlines(timeout=timeout, stall_timeout=None),
        number=number,
    ) as operation:
        operation.step("barrier", lambda: b"", lambda _: Decision())


def _host(address: StoreAddress, timeout: float, libuv: bool) -> Any:
    try:
        return _distributed.TCPStore(
            address.host,
            address.port,
            None,
            True,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            use_libuv=libuv,
        )
    except RuntimeError as error:  # all errors of c10d stores are
        reason = str(error).split("Exception raised from", 1)[0].strip()
        raise CoordinationError(
            f"a store cannot be hosted at {address}: {reason}",
            kind="store_lost",
            rank=0,
            hint="choose a tcpstore_port that is free on the host of rank 0",
        ) from None
