"""Writing one rank's part of checkpoints, and committing them together with the other ranks.

Belongs here: ``CheckpointWriter``: how its arguments become one save of the engine. Does not
belong here: saving (``dcp_engine.saver``).
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dcp_engine.checkpointer.barriers import Barrier
from dcp_engine.checkpointer.commit_hook import HookedOperation, WriterHook
from dcp_engine.checkpointer.own_leaves import MarkedState
from dcp_engine.checkpointer.sessions import Meeting, WriterSessions, WriteTurn
from dcp_engine.checkpointer.staging import StagedStateDict
from dcp_engine.checkpointer.types import STATE_DICT, RankInfo
from dcp_engine.closing import Closing
from dcp_engine.coordination.interface import Deadlines, Operation
from dcp_engine.errors import UsageError
from dcp_engine.registry import BackendRegistry
from dcp_engine.saver import PlanMemory, SaveOptions
from dcp_engine.saver.save import carry_out, content_of, require_writer

__all__ = ["CheckpointWriter", "CheckpointWriterConfig", "WriterHook"]


@dataclass
class CheckpointWriterConfig:
    """How long a writer waits."""

    write_barrier_timeout_secs: float = 600
    """Seconds for all ranks to come, write and commit."""
    stall_timeout_secs: float = 60
    """Seconds without a sign of life after which a rank counts as dead."""


class CheckpointWriter(Closing):
    """Writes checkpoints that ``dcp_engine.load`` reads, together with the writers of the other
    ranks, by one commit. A context manager.

    ``DTensor`` and ``ShardedTensor`` are stored as sharded; every other leaf is this rank's own.

    Args:
        config: how long to wait.
        rank_info: this process among those that write together.
        barrier: the way to the other ranks where the processes that write have no
            ``torch.distributed``: one of type ``"tcp_store"``. A barrier of another origin is
            executed after the commit, before ``post_commit``.
        commit_hook: called around the commit.
        registry: finds the storage backend of a path; by default what is installed.
    """

    def __init__(
        self,
        config: CheckpointWriterConfig,
        rank_info: RankInfo,
        barrier: Barrier | None = None,
        commit_hook: WriterHook | None = None,
        *,
        registry: BackendRegistry | None = None,
    ) -> None:
        self._config = config
        self._rank_info = rank_info
        self._barrier = barrier
        self._commit_hook = commit_hook
        self._sessions = WriterSessions(
            rank_info, barrier, timeout=config.write_barrier_timeout_secs
        )
        self._registry = registry if registry is not None else BackendRegistry()
        self._plans = PlanMemory()
        self._turn: WriteTurn | None = None
        self._closed = False

    def take_turn(self, turn: WriteTurn) -> None:
        """The next ``write`` is this one, on behalf of another process."""
        self._turn = turn

    def give_up_turn(self, path: str | os.PathLike[str], error: BaseException) -> None:
        """The turn that was taken does not come to a ``write``, because of ``error``: the other
        ranks fail by it at once. Does nothing if it did come to one."""
        turn, self._turn = self._turn, None
        if turn is None or self._closed or self._rank_info.global_world_size == 1:
            return
        try:
            with (
                self._sessions.meet(turn) as meeting,
                meeting.session.begin(
                    "save",
                    os.fspath(path),
                    deadlines=self._deadlines(),
                    number=meeting.number,
                ),
            ):
                raise error
        except BaseException as raised:
            if raised is not error:
                error.add_note(f"the other ranks could not be told: {raised}")

    def write(
        self, path: str | os.PathLike[str], state_dict: STATE_DICT, **kwargs: Any
    ) -> Future[None] | None:
        """Write this rank's part and commit. Every rank has to call this.

        When it returns, on any rank, the checkpoint is committed and on stable storage. When it
        raises, it raises on every rank (but for ``post_commit``), and what was there before is
        still there.

        Args:
            path: path or URL of the checkpoint, the same on all ranks.
            state_dict: a ``StagedStateDict`` too.
            kwargs: for the commit hook.

        Returns:
            None: the write is over.

        Raises:
            CheckpointException: naming the ranks that failed, and missing ones.
            UsageError: there is no way to the other ranks.
        """
        turn, self._turn = self._turn, None
        if self._closed:
            raise UsageError("the writer is closed", checkpoint=path, hint="make a new one")
        shared = state_dict.shared if isinstance(state_dict, StagedStateDict) else frozenset()
        with self._sessions.meet(turn) as meeting:
            self._save(
                os.fspath(path), MarkedState(lambda: state_dict, shared), meeting, turn, kwargs
            )
        if self._barrier is not None and not self._barrier.waits_at_commit:
            self._barrier.execute_barrier()
        if self._commit_hook is not None:
            self._commit_hook.post_commit(os.fspath(path), **kwargs)
        return None

    def close(self) -> None:
        """Close the connections to the other ranks, and the barrier. May be called twice."""
        self._closed = True
        self._sessions.close()
        if self._barrier is not None:
            self._barrier.close()

    def _save(
        self,
        path: str,
        state: MarkedState,
        meeting: Meeting,
        turn: WriteTurn | None,
        kwargs: dict[str, Any],
    ) -> None:
        options = SaveOptions(deadlines=self._deadlines())
        hook = self._commit_hook
        # All that may fail comes after the begin, so that the other ranks hear of it.
        with meeting.session.begin(
            "save", path, deadlines=options.deadlines, number=meeting.number
        ) as begun:
            storage = self._registry.writer(path)
            require_writer(storage)
            operation: Operation = begun
            if hook is not None:
                operation = HookedOperation(begun, lambda: hook.pre_commit(path, **kwargs))
            carry_out(
                operation,
                content_of(
                    state, writer=storage, planner=None, group=meeting.group, options=options
                ),
                checkpoint_id=path,
                writer=storage,
                identity=meeting.session.identity,
                rank=self._rank_info.global_rank,
                world_size=self._rank_info.global_world_size,
                memory=self._plans,
                options=options,
                by_worker=turn is not None,
            )

    def _deadlines(self) -> Deadlines:
        return Deadlines(
            timeout=self._config.write_barrier_timeout_secs,
            stall_timeout=self._config.stall_timeout_secs,
        )
