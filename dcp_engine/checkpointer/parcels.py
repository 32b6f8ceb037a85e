"""State dicts on their way to the child.

Belongs here: holding staging memory until it is written, and naming arenas to the child. Does not
belong here: copying (``staging``) and sending (``checkpoint_process``).
"""

from __future__ import annotations

import abc
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


class HeldState(abc.ABC):
    """A state dict whose memory is not given back before ``release``."""

    @abc.abstractmethod
    def pack(self, numbers: ArenaNumbers) -> tuple[SentState, list[int]]:
        """What is sent, and the descriptors that go with it; waits until the copy is whole.

        Raises what staging failed with.
        """

    @abc.abstractmethod
    def release(self) -> None:
        """It is written, or never will be. May be called twice."""


class _Staged(HeldState):
    """One in staging memory.

    Args:
        state: pickled now: where its tensors are is known, even if the copy is under way.
        lease: held already; given back if the state cannot be pickled.
    """

    def __init__(self, state: StagedStateDict, lease: Lease) -> None:
        self._lease: Lease | None = lease
        self._shared = state.shared
        try:
            self._pickled = dump_staged(dict(state), lease.arena)
        except BaseException:
            lease.drop()
            raise

    def pack(self, numbers: ArenaNumbers) -> tuple[SentState, list[int]]:
        """See the base class."""
        if self._lease is None:
            raise UsageError("a state dict was packed after it was released")
        self._lease.completion.result()
        arena = self._lease.arena
        sent = SentState(
            pickled=self._pickled,
            shared=self._shared,
            arena=numbers.number(arena),
            arena_size=arena.size,
            arenas=numbers.open(),
        )
        return sent, numbers.descriptors(arena)

    def release(self) -> None:
        """See the base class."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.drop()


class _Awaited(HeldState):
    """The future of one: whatever it gives is held, or staged, when it is there."""

    def __init__(self, future: Future[dict[str, Any]], stager: EngineStager, check: Check) -> None:
        self._future: Future[dict[str, Any]] | None = future
        self._stager = stager
        self._check = check
        self._held: HeldState | None = None

    def pack(self, numbers: ArenaNumbers) -> tuple[SentState, list[int]]:
        """See the base class."""
        if self._future is None:
            raise UsageError("a state dict was packed after it was released")
        self._held = _hold_now(self._future.result(), self._stager, self._check)
        return self._held.pack(numbers)

    def release(self) -> None:
        """See the base class."""
        self._future = None
        if self._held is not None:
            self._held.release()


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

    Raises ``UnsupportedStateError`` for what cannot be pickled, naming the key.
    """
    now, later = stagers
    if isinstance(state_dict, StagingFuture):
        return _hold_now(state_dict.state, now, check)
    if isinstance(state_dict, Future):
        return _Awaited(state_dict, later, check)
    return _hold_now(state_dict, now, check)


def _hold_now(state_dict: dict[str, Any], stager: EngineStager, check: Check) -> HeldState:
    lease = state_dict.lease if isinstance(state_dict, StagedStateDict) else None
    if isinstance(state_dict, StagedStateDict) and lease is not None:
        if not lease.hold():
            raise UsageError(
                "the staged state dict was overwritten by a later stage(), or its stager is closed",
                hint="write a staged state dict before the next one is staged",
            )
        return _Staged(state_dict, lease)
    staged, lease = stage_now(stager, state_dict, background=False, check=check)
    return _Staged(staged, lease)
