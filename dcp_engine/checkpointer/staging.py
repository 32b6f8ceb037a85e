"""Copies of a state dict that training cannot change: this layer's stagers.

Belongs here: the interface, and the default stager, which asks the engine's own
(``dcp_engine.staging``). Does not belong here: memory and copying.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dcp_engine.checkpointer.own_leaves import shared_names
from dcp_engine.checkpointer.types import STATE_DICT
from dcp_engine.closing import Closing
from dcp_engine.errors import UsageError
from dcp_engine.staging.arena import Arena
from dcp_engine.staging.arena_stager import no_check
from dcp_engine.staging.stagers import DefaultStager as EngineStager
from dcp_engine.staging.stagers import StagedState, StagingOptions
from dcp_engine.state.flatten import flatten, resolve_stateful
from dcp_engine.storage import Check

__all__ = [
    "CheckpointStager",
    "CheckpointStagerConfig",
    "DefaultStager",
    "Lease",
    "StagedStateDict",
    "StagingFuture",
    "stage_now",
]


class CheckpointStager(Closing):
    """Makes the copy that is written while training goes on. A context manager."""

    @abc.abstractmethod
    def stage(self, state_dict: STATE_DICT, **kwargs: Any) -> STATE_DICT | Future[STATE_DICT]:
        """A copy of ``state_dict``, or the future of one: while that is not done, the original
        must not change.

        Args:
            kwargs: those of the checkpointer's ``save``.
        """


@dataclass
class CheckpointStagerConfig:
    """How state dicts are staged. What concerns CUDA has no effect where there is none."""

    use_pinned_memory: bool = True
    """Register staging memory with CUDA."""
    use_shared_memory: bool = True
    """Has no effect: staging memory can always be mapped by the checkpoint process, at no cost."""
    use_async_staging: bool = True
    """Copy in the background: ``stage`` returns a future, before which the state must not
    change. False: the copy is whole when ``stage`` returns."""
    use_non_blocking_copy: bool = True
    """Has no effect: copies from CUDA devices always run on a stream of their own."""


class Lease:
    """Staging memory, given back when nobody holds it any more."""

    def __init__(self, staged: StagedState) -> None:
        self._staged = staged
        self._holders = 1
        self._lock = threading.Lock()

    @property
    def arena(self) -> Arena:
        """The memory."""
        return self._staged.staging.arena

    @property
    def completion(self) -> Future[None]:
        """Done when the copy is whole."""
        return self._staged.completion

    def hold(self) -> bool:
        """One more holder; False if the memory was given back already."""
        with self._lock:
            if self._holders == 0:
                return False
            self._holders += 1
            return True

    def drop(self) -> None:
        """One holder less; every ``hold`` that said True, and the maker, call it once."""
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last:
            self._staged.release()


class StagedStateDict(dict[str, Any]):
    """A state dict whose tensors lie in staging memory.

    Attributes:
        shared: names of the leaves that are shared between ranks. A replicated ``DTensor`` is a
            plain tensor here, and its looks do not tell.
        lease: the memory; None in a process that only maps it.
    """

    def __init__(
        self, values: Mapping[str, Any], *, shared: Collection[str], lease: Lease | None
    ) -> None:
        super().__init__(values)
        self.shared = frozenset(shared)
        self.lease = lease


class StagingFuture(Future[STATE_DICT]):
    """The future of a ``StagedStateDict`` that is being filled. Cannot be cancelled.

    Attributes:
        state: what is being filled.
    """

    def __init__(self, state: StagedStateDict) -> None:
        super().__init__()
        self.state = state
        self.set_running_or_notify_cancel()


def stage_now(
    stager: EngineStager, state_dict: Mapping[str, Any], *, background: bool, check: Check
) -> tuple[StagedStateDict, Lease]:
    """Stage with the engine's stager; with ``background``, done when ``lease.completion`` is.

    Args:
        check: called while waiting for memory; what it raises ends the wait.
    """
    resolved, _ = resolve_stateful(state_dict)
    shared = shared_names(flatten(resolved).leaves)
    staged = stager.begin(resolved, background=background, check=check)
    lease = Lease(staged)
    return StagedStateDict(staged.state_dict, shared=shared, lease=lease), lease


class DefaultStager(CheckpointStager):
    """Stages into one piece of reused shared memory.

    It has one copy at a time: ``stage`` overwrites the state dict that it returned before, once
    nobody writes that one any more (a ``CheckpointProcess`` holds what it was given until it is
    written). Not safe to use from several threads.
    """

    def __init__(self, config: CheckpointStagerConfig | None = None) -> None:
        config = config if config is not None else CheckpointStagerConfig()
        self._stager = EngineStager(
            StagingOptions(
                use_pinned_memory=config.use_pinned_memory,
                use_shared_memory=config.use_shared_memory,
                use_async_staging=config.use_async_staging,
                use_non_blocking_copy=config.use_non_blocking_copy,
            )
        )
        self._background = config.use_async_staging
        self._last: Lease | None = None
        self._closed = False

    def stage(self, state_dict: STATE_DICT, **kwargs: Any) -> STATE_DICT | Future[STATE_DICT]:
        """A ``StagedStateDict``, or with ``use_async_staging`` the future of one.

        Objects are copied before this returns, and ``Stateful`` values asked for their state.

        Args:
            kwargs: are the writer's, and mean nothing here.
        Raises:
            UnsupportedStateError: naming the key, for what a save would refuse.
            StagingError: too little memory; nothing was touched.
        """
        if self._closed:
            raise UsageError("the stager is closed", hint="make a new one")
        self._drop_last()
        staged, lease = stage_now(
            self._stager, state_dict, background=self._background, check=no_check
        )
        self._last = lease
        if not self._background:
            return staged
        future = StagingFuture(staged)

        def finish(completion: Future[None]) -> None:
            error = completion.exception()
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(staged)

        lease.completion.add_done_callback(finish)
        return future

    def close(self) -> None:
        """Wait for what is being copied, and give the memory back as soon as nobody writes it."""
        self._closed = True
        self._drop_last()
        self._stager.close()

    def _drop_last(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.drop()
