"""State dicts on their way to the child.

Belongs here: holding staging memory until it is written, and naming arenas to the child. Does not
belong here: copying (``staging``) and sending (``checkpoint_process``).
"""

from __future__ import annotations

import weakref
from concurrent.futures import Future
from typing import Any

from dcp_engine.checkpointer.process_protocol import SentState
from dcp_engine.checkpointer.staging import (
    Lease,
    StagedStateDict,
    StagingFuture,
    stage_now,
)
from dcp_engine.errors import UsageError
from dcp_engine.staging.arena import Arena
from dcp_engine.staging.staged_pickle import dump_staged
from dcp_engine.staging.stagers import DefaultStager as EngineStager
from dcp_engine.storage import Check

__all__ = ["ArenaNumbers", "HeldState", "hold_state"]


class ArenaNumbers:
    """What the child knows arenas by. For one thread."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Arena, int] = weakref.WeakKeyDictionary()
        self._next = 0
        self._sent: set[int] = set()

    def number(self, arena: Arena) -> int:
        """Of ``arena``; never another one's."""
        if arena not in self._numbers:
            self._numbers[arena], self._next = self._next, self._next + 1
        return self._numbers[arena]

    def open(self) -> frozenset[int]:
        """Of all arenas that are still there."""
        return frozenset(n for arena, n in self._numbers.items() if not arena.closed)

    def descriptors(self, arena: Arena) -> list[int]:
        """What has to go with a request about ``arena``."""
        return [] if self.number(arena) in self._sent else [arena.fileno()]

    def sent(self, number: int) -> None:
        """The child has this one."""
        self._sent = {n for n in (*self._sent, number) if n in self.open()}

    def forget_sent(self) -> None:
        """It is a new child."""
        self._sent.clear()


class HeldState:
    """A state dict, or the future of one, whose memory is not given back before ``release``.

    Args:
        state: staged, or the future of anything.
        lease: held already; None for a future that is not this layer's.
        stager: for what such a future gives.
        check: called while waiting for memory.
    """

    def __init__(
        self,
        state: StagedStateDict | Future[dict[str, Any]],
        lease: Lease | None,
        stager: EngineStager,
        check: Check,
    ) -> None:
        self._state: StagedStateDict | Future[dict[str, Any]] | None = state
        self._lease = lease
        self._stager = stager
        self._check = check

    def pack(self, numbers: ArenaNumbers) -> tuple[SentState, list[int]]:
        """What is sent, and the descriptors that go with it; waits for a future.

        Raises what staging failed with, and ``UnsupportedStateError`` for what cannot be pickled.
        """
        state = self._state
        if isinstance(state, Future):
            value = state.result()
            if not isinstance(value, StagedStateDict):
                value = stage_now(self._stager, value, background=False, check=self._check)
                self._lease = value.lease
            state = value
        if state is None or self._lease is None:
            raise UsageError("a state dict was packed after it was released")
        arena = self._lease.arena
        sent = SentState(
            pickled=dump_staged(dict(state), arena),
            shared=state.shared,
            arena=numbers.number(arena),
            arena_size=arena.size,
            arenas=numbers.open(),
        )
        return sent, numbers.descriptors(arena)

    def release(self) -> None:
        """It is written, or never will be. May be called twice."""
        self._state = None
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.drop()


def hold_state(
    state_dict: dict[str, Any] | Future[dict[str, Any]],
    stagers: tuple[EngineStager, EngineStager],
    check: Check,
) -> HeldState:
    """Hold ``state_dict``; what is not staged (and no future) is staged now.

    Args:
        stagers: for state dicts, and for what futures give. They are two, because a future's may
            have to be staged while a later state dict waits, staged already.
        check: called while waiting for memory; what it raises ends the wait.
    """
    now, later = stagers
    if isinstance(state_dict, StagedStateDict | StagingFuture) and state_dict.lease is not None:
        if not state_dict.lease.hold():
            raise UsageError(
                "the staged state dict was overwritten by a later stage(), or its stager is closed",
                hint="write a staged state dict before the next one is staged",
            )
        return HeldState(state_dict, state_dict.lease, later, check)
    if isinstance(state_dict, Future):
        return HeldState(state_dict, None, later, check)
    staged = stage_now(now, state_dict, background=False, check=check)
    return HeldState(staged, staged.lease, later, check)
