"""The ranks of an engine's operations: which they are, and the session with them.

Belongs here: opening sessions when they are needed, closing them, and whether this process may
still use them. Does not belong here: what
is done over them (``engine``).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch.distributed as dist

from dcp_engine.coordination.group import describe_group
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Session
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.single import SingleSession
from dcp_engine.engine.arguments import CheckpointId
from dcp_engine.errors import CheckpointException, CoordinationError, UsageError
from dcp_engine.state.adapters import GroupRanks

__all__ = ["Place", "Sessions"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process in the group of an operation."""

    group: GroupRanks
    world_size: int
    name: str


class Sessions:
    """Those of one engine: with the other ranks of its group, and of this process alone.

    Args:
        process_group: None for the default group, or for this process alone where
            torch.distributed is not initialised.
        connect_timeout: seconds to wait for the other ranks.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, *, connect_timeout: float) -> None:
        self._process_group = process_group
        self._connect_timeout = connect_timeout
        self._with_others: Session | None = None
        self._alone: dict[int, Session] = {}
        """By the rank that failures name."""
        self._closed = False
        self._owner: int | None = None
        """The process that used this first."""

    @property
    def closed(self) -> bool:
        """Whether ``refuse_more`` or ``close`` was called."""
        return self._closed

    def place(self, no_dist: bool) -> Place:
        """This process among the ranks that ``no_dist`` leaves."""
        self.refuse_in_fork()
        if no_dist or not self._distributed:
            return Place(group=GroupRanks(), world_size=1, name="")
        info = describe_group(self._process_group)
        return Place(
            group=GroupRanks(ranks=info.global_ranks, rank=info.rank),
            world_size=info.world_size,
            name=info.name,
        )

    def own_rank(self) -> int:
        """This process's in the group, for names of its own; 0 where it is in none."""
        try:
            return self.place(no_dist=False).group.rank
        except UsageError:  # of no interest to whoever saves alone
            return 0

    def get(
        self, no_dist: bool, timeout: float | None = None, checkpoint_id: CheckpointId = None
    ) -> Session:
        """The session with the ranks that ``no_dist`` leaves; opened at the first use, within the
        ``timeout`` of the operation that needs it.

        Raises:
            CheckpointException: the other ranks did not come.
            UsageError: all sessions are closed.
        """
        if no_dist or not self._distributed:
            return self.alone()
        self.refuse_if_closed()
        if self._with_others is None:
            limit = min(self._connect_timeout, math.inf if timeout is None else timeout)
            try:
                self._with_others = open_session(self._process_group, connect_timeout=limit)
            except CoordinationError as error:
                raise CheckpointException(
                    f"the ranks did not come together: {error.message}",
                    kind=error.kind,
                    checkpoint=checkpoint_id,
                    hint=error.hint,
                ) from error
        return self._with_others

    def use(self, session: Session) -> None:
        """Take ``session`` for the one with the other ranks, instead of opening one."""
        self._with_others = session

    def alone(self, known_as: int = 0) -> Session:
        """The session of this process, whatever others there are; its failures call it rank
        ``known_as``."""
        self.refuse_if_closed()
        if known_as not in self._alone:
            self._alone[known_as] = SingleSession(run_identity(""), known_as=known_as)
        return self._alone[known_as]

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of one that has used this, whose they are."""
        return self._owner is not None and self._owner != os.getpid()

    def refuse_in_fork(self) -> None:
        """Raise ``UsageError`` in a fork: its threads, connections and worker are its parent's."""
        if self.inherited:
            raise UsageError(
                f"this engine belongs to process {self._owner}, of which this one is a fork",
                hint="make a dcp_engine.Engine in this process",
            )
        self._owner = os.getpid()

    def refuse_if_closed(self) -> None:
        """Raise ``UsageError`` after ``refuse_more`` or ``close``, and in a fork."""
        self.refuse_in_fork()
        if self._closed:
            raise UsageError("this engine is closed", hint="make a new dcp_engine.Engine")

    def refuse_more(self) -> None:
        """Operations that have their session go on; no other one gets any."""
        self._closed = True

    def close(self) -> None:
        """Give back connections. Any number of times."""
        self._closed = True
        for session in (self._with_others, *self._alone.values()):
            if session is not None:
                session.close()
        self._with_others = None
        self._alone.clear()

    @property
    def _distributed(self) -> bool:
        return self._process_group is not None or (dist.is_available() and dist.is_initialized())
