"""How a writer meets the writers of the other ranks.

Belongs here: the choice between the ways there are, and which number a write has. Does not belong
here: the ways themselves (``coordination``, ``barriers``).

In this order: no way at all for one rank; the session of the process that this one writes for;
the barrier's store; ``torch.distributed``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from dcp_engine.checkpointer.barriers import Barrier
from dcp_engine.checkpointer.types import RankInfo
from dcp_engine.coordination.group import describe_group
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Session, SessionHandle
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.single import SingleSession
from dcp_engine.errors import UsageError
from dcp_engine.state.adapters import GroupRanks

__all__ = ["Meeting", "WriteTurn", "WriterSessions"]


@dataclass(frozen=True, kw_only=True)
class WriteTurn:
    """A write that another process asked for and counts."""

    number: int
    """The same on all ranks."""
    session: SessionHandle | None
    """Over which to commit; None where the writer has to know a way of its own."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """One write's way to the other ranks."""

    session: Session
    number: int | None
    """For ``Session.begin``; None: the session counts."""
    group: GroupRanks


class WriterSessions:
    """The sessions of one writer.

    Args:
        rank_info: this process among the writers.
        barrier: may know the way to the others.
        timeout: seconds for the ranks to meet.
    """

    def __init__(self, rank_info: RankInfo, barrier: Barrier | None, *, timeout: float) -> None:
        self._rank = rank_info
        self._barrier = barrier
        self._timeout = timeout
        self._writes = 0
        self._own: Session | None = None

    @contextmanager
    def meet(self, turn: WriteTurn | None) -> Iterator[Meeting]:
        """The way of the next write.

        Args:
            turn: tells, where another process counts the writes.
        Raises:
            UsageError: there is no way to the other ranks.
        """
        count, self._writes = self._writes, self._writes + 1
        number = count if turn is None else turn.number
        rank, world_size = self._rank.global_rank, self._rank.global_world_size
        if world_size == 1:
            yield Meeting(session=self._alone(), number=None, group=GroupRanks())
            return
        borrowed = self._borrowed(turn)
        if borrowed is not None:
            with borrowed:
                group = GroupRanks(ranks=tuple(range(world_size)), rank=rank)
                yield Meeting(session=borrowed, number=number, group=group)
            return
        yield Meeting(session=self._of_process_group(), number=None, group=self._group())

    def close(self) -> None:
        """Close the session that is kept between writes, if there is one."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def _borrowed(self, turn: WriteTurn | None) -> Session | None:
        if turn is not None and turn.session is not None:
            return turn.session.attach()
        return None if self._barrier is None else self._barrier.session()

    def _alone(self) -> Session:
        if self._own is None:
            self._own = SingleSession(run_identity(""))
        return self._own

    def _of_process_group(self) -> Session:
        if not (dist.is_available() and dist.is_initialized()):
            raise UsageError(
                f"the writer is one of {self._rank.global_world_size} and knows no way to the "
                "others, with whom it has to commit",
                rank=self._rank.global_rank,
                hint='give it a barrier of type "tcp_store", or initialize torch.distributed in '
                "the process that writes (subprocess_init_fn) or in the one that it writes for, "
                "or use RankInfo(0, 1) to write a checkpoint of this process alone",
            )
        if self._own is None:
            self._own = open_session(connect_timeout=self._timeout)
        return self._own

    def _group(self) -> GroupRanks:
        info = describe_group(None)
        if (info.rank, info.world_size) != (self._rank.global_rank, self._rank.global_world_size):
            raise UsageError(
                f"the writer is rank {self._rank.global_rank} of {self._rank.global_world_size}, "
                f"and torch.distributed says rank {info.rank} of {info.world_size}",
                hint="make RankInfo of dist.get_rank() and dist.get_world_size(), or give the "
                'writer a barrier of type "tcp_store"',
            )
        return GroupRanks(ranks=info.global_ranks, rank=info.rank)
