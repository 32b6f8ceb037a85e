"""One step on every rank: what savers and loaders know of the other ranks.

Belongs here: the abstract ``Session`` and ``Operation`` and the data classes they speak in. The
implementations are beside this module: ``single`` (no other ranks), ``store`` (a c10d store),
``collective`` (object collectives, where no store can be reached), ``simulated`` (threads).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dcp_engine.closing import Closing
from dcp_engine.errors import CheckpointException, UsageError

__all__ = [
    "Deadlines",
    "DeathVerdict",
    "Decision",
    "Operation",
    "OperationKind",
    "Outcome",
    "RunIdentity",
    "Session",
    "SessionHandle",
]

OperationKind = Literal["save", "load", "barrier"]
Outcome = Literal["commit", "abort"]


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long to wait. Seconds; None waits forever."""

    timeout: float | None = 1800.0
    """The whole operation."""
    stall_timeout: float | None = 60.0
    """Without a heartbeat of a rank. A slow write that still beats is no stall."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """By name of the phase."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the coordinator answers to all ranks: the same bytes for all, and bytes for each."""

    common: bytes = b""
    per_rank: Sequence[bytes] | None = None


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Who is writing: enough to tell later whether that process still lives."""

    run_id: str
    restart_count: int
    group: str
    host: str
    boot_id: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class DeathVerdict:
    """What became of an operation after a rank's process had died in it."""

    outcome: Outcome | None = None
    """How the save ends by the decision key; None where only the dead process knew."""
    failure: CheckpointException | None = None
    """What all ranks raise; None where nobody asked, or it could not be learned."""


class Operation(Closing):
    """One numbered save, load or barrier, on every rank of the session's group. A context manager:
    leaving it stops its heartbeats and removes its keys."""

    rank: int
    world_size: int
    coordinator_rank: int
    number: int

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank decides."""
        return self.rank == self.coordinator_rank

    @abc.abstractmethod
    def step(
        self,
        phase: str,
        local: Callable[[], bytes],
        decide: Callable[[list[bytes]], Decision],
        *,
        decide_phase: str | None = None,
        regardless: bool = False,
    ) -> tuple[bytes, bytes]:
        """Run ``local`` on every rank, then ``decide`` on the coordinator over what they
        returned (in rank order); return the decision's common bytes and this rank's own.

        If ``local`` raises on any rank, or ``decide`` on the coordinator, every rank raises
        ``CheckpointException`` naming the failed ranks (any ``BaseException`` counts;
        ``KeyboardInterrupt`` and ``SystemExit`` are reported and re-raised on their own rank).
        While ``local`` runs, a failure elsewhere is seen by ``check``. A rank that is missing or
        silent is named by ``CheckpointException`` with kind ``timeout`` or ``stalled``. A store
        that is gone is kind ``store_lost``. ``decide_phase`` names the second half in messages
        and for ``Deadlines.phases`` (default: ``phase``). ``regardless``: call ``local`` even if
        another rank has failed already, because this one has something to say of its own.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Raise ``CoordinationError(kind="interrupted")`` if another rank failed, or ``timeout``
        if the operation's deadline passed. A read of local memory: call it in any loop, from any
        thread."""

    @abc.abstractmethod
    def decide_once(self, outcome: Outcome) -> Outcome:
        """Propose how the save ends; the first proposal of any rank wins and is returned to all.
        Raises ``CoordinationError(kind="store_lost")`` when it cannot be known."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop heartbeats, remove keys. May be called twice."""


class SessionHandle(abc.ABC):
    """A session on its way to another process; picklable. Made by ``Session.handle``."""

    rank: int
    world_size: int
    identity: RunIdentity
    """Of the process that opened the session."""

    @abc.abstractmethod
    def attach(self) -> Session:
        """The same session for the calling process, which stands for the one that opened it: no
        handshake, no message. Its identity is the run of that one and the process of this one. It
        takes no numbers of its own: ``begin`` needs ``number=``."""


class Session(Closing):
    """A group of ranks that can run operations together, one after the other or several at once
    from different threads if every rank begins them in the same order."""

    rank: int
    world_size: int
    identity: RunIdentity

    @abc.abstractmethod
    def begin(
        self,
        kind: OperationKind,
        checkpoint_id: str,
        *,
        deadlines: Deadlines,
        coordinator_rank: int = 0,
        number: int | None = None,
    ) -> Operation:
        """Take the next number, on the calling thread, or go on with one that was taken before.
        No waiting and no message to others; ranks that turn out to be in different operations get
        ``out_of_step``, naming both.

        A number is begun by one process a rank: this one, or one that attached to the session.
        """

    @abc.abstractmethod
    def take_number(self) -> int:
        """The next number, for ``begin(number=...)``, here or in a process that attached to this
        session (``handle``), at any time. Ranks have to take their numbers in one order."""

    def handle(self) -> SessionHandle:
        """What another process needs to stand for this rank in this session.

        Raises:
            UsageError: the session cannot be reached from another process.
        """
        raise UsageError(
            f"a {type(self).__name__} cannot be continued in another process",
            hint="initialize the process group with a TCPStore or a FileStore, or save with "
            "threads instead of a worker process",
        )

    def report_death(
        self,
        number: int,
        *,
        coordinator_rank: int,
        error: BaseException,
        checkpoint: str | None = None,
    ) -> DeathVerdict:
        """The process that had begun operation ``number`` for this rank, and had not left it, is
        dead: every other rank fails with ``error`` of this rank, unless it has failed already or
        the operation is over for it.

        Args:
            checkpoint: its name, if it is of interest with what all ranks fail: the others may
                have failed, too. That takes a moment to be known.

        Raises ``CoordinationError(kind="store_lost")`` when its outcome cannot be known.
        """
        return DeathVerdict()

    def remove_remains(self, number: int) -> None:
        """Remove what a process that died in operation ``number`` has left behind. Only once all
        ranks have ended it, as they have when a later one has gone well that they begin after it.

        Raises ``CoordinationError(kind="store_lost")``.
        """

    def data_store(self, number: int) -> Any:
        """A c10d store (torch's type stubs do not name the class) for a process group that
        operation ``number`` makes for itself, under a prefix of its own; None where no store can
        be reached."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Close connections. May be called twice."""
