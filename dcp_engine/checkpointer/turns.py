"""The writes of this rank, counted where they are asked for.

Belongs here: numbers, and the session that is lent to the child. Does not belong here: how a child
uses them (``sessions``).

The numbers are the parent's, so that ranks stay in step whatever happens to their children.
"""

from __future__ import annotations

import logging
import threading

import torch.distributed as dist

from dcp_engine.checkpointer.sessions import WriteTurn
from dcp_engine.checkpointer.types import RankInfo
from dcp_engine.coordination.group import describe_group, store_access
from dcp_engine.coordination.interface import Outcome, Session
from dcp_engine.coordination.open_session import open_session
from dcp_engine.errors import CheckpointError

__all__ = ["ParentTurns"]

logger = logging.getLogger(__name__)


class ParentTurns:
    """Numbers of writes, the same on all ranks that ask in one order."""

    def __init__(self, rank_info: RankInfo) -> None:
        self._rank = rank_info
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._next = 0

    def take(self) -> WriteTurn:
        """The next one. The first waits for all ranks, if they have ``torch.distributed``.

        Raises ``CoordinationError``, kind ``timeout``, naming the ranks that did not come.
        """
        with self._lock:
            if self._session is None and self._can_lend():
                self._session = open_session()
            if self._session is not None:
                return WriteTurn(number=self._session.take_number(), session=self._session.handle())
            number, self._next = self._next, self._next + 1
            return WriteTurn(number=number, session=None)

    def report(self, turn: WriteTurn, error: BaseException) -> Outcome | None:
        """Tell the other ranks that the child which had ``turn`` is dead.

        Returns how the write ends by the ranks' decision; None where there is none to be known.
        """
        if self._session is None:
            return None
        try:
            death = self._session.report_death(turn.number, coordinator_rank=0, error=error)
            return death.outcome
        except CheckpointError:
            logger.warning("the other ranks could not be told: %s", error, exc_info=True)
            return "commit"  # it may have been

    def close(self) -> None:
        """Close the session."""
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def _can_lend(self) -> bool:
        """Whether the ranks of ``torch.distributed`` here are those that write, and have a store
        that a child can reach."""
        if self._rank.global_world_size == 1:
            return False
        if not (dist.is_available() and dist.is_initialized()):
            return False
        info = describe_group(None)
        if (info.rank, info.world_size) != (self._rank.global_rank, self._rank.global_world_size):
            return False
        access = store_access(None)
        return access is not None and access.address.kind != "memory"
