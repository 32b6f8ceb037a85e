"""DCP's stagers: what ``async_save(async_stager=...)`` takes.

Belongs here: the protocol that custom stagers follow, and the two stagers of DCP's names. Does not
belong here: how tensors are copied (``arena_stager``).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from dcp_engine.closing import Closing
from dcp_engine.errors import UnsupportedStateError
from dcp_engine.metadata import STATE_DICT_TYPE
from dcp_engine.staging.arena_stager import ArenaStager, Staging, no_check
from dcp_engine.staging.staged_state import describe_state
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.state.adapters.torch_types import has_checkpoint_methods
from dcp_engine.state.flatten import flatten, resolve_stateful
from dcp_engine.storage import Check

__all__ = ["AsyncStager", "BlockingAsyncStager", "DefaultStager", "StagedState", "StagingOptions"]


_CHECKED_TYPES = frozenset({int, float, str, bool, bytes, type(None)})


@runtime_checkable
class AsyncStager(Protocol):
    """How ``async_save`` gets a state dict that training cannot change.

    Derive from it and override ``stage``. Order of calls: ``stage`` at every save; then, if
    ``should_synchronize_after_execute``, ``synchronize_staging`` before ``async_save`` returns
    (else the caller sees to it before changing the state); ``close`` in the end.
    """

    _synchronize_after_execute: bool = True

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether ``async_save`` waits for staging before it returns."""
        return self._synchronize_after_execute

    def stage(self, state_dict: STATE_DICT_TYPE) -> Future[STATE_DICT_TYPE] | STATE_DICT_TYPE:
        """A copy of ``state_dict``, or the future of one. Once it is there, changes to the
        original do not reach it."""
        raise NotImplementedError(f"{type(self).__name__} must implement stage")

    def synchronize_staging(self) -> None:
        """Return when the copy is whole."""
        return None

    def close(self) -> None:
        """Release what the stager holds."""
        return None


@dataclass(frozen=True)
class StagingOptions:
    """How ``DefaultStager`` stages.

    Unlike in torch's DCP every option works everywhere, and staging blocks unless asked.
    """

    use_pinned_memory: bool = True
    """Register staging memory with CUDA. Without CUDA there is nothing to register with."""
    use_shared_memory: bool = True
    """Has no effect: staging memory can always be mapped by a worker process, at no cost."""
    use_async_staging: bool = False
    """Copy in the background: ``stage`` returns a future. The state must not change before it is
    done; see ``synchronize_staging`` and ``install_staging_hook``."""
    use_non_blocking_copy: bool = True
    """Has no effect: copies from CUDA devices always run on a stream of their own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedState:
    """A state dict whose tensors are, or are becoming, views into an arena."""

    state_dict: dict[str, Any]
    """To be read after ``completion``, and until ``release``."""
    staging: Staging

    @property
    def completion(self) -> Future[None]:
        """Done when the original may change; see ``Staging``."""
        return self.staging.completion

    def wait(self, timeout: float | None = None) -> None:
        """See ``Staging.wait``."""
        self.staging.wait(timeout)

    def release(self) -> None:
        """See ``Staging.release``."""
        self.staging.release()


class DefaultStager(Closing, AsyncStager):
    """Stages into reused shared memory.

    ``stage`` has one copy at a time: the state dict that it returned before is overwritten. Who
    knows when a save is over uses ``begin`` and ``release``, as the engine does.

    Args:
        config: options, also those of torch's DCP.
        arenas: how many copies may be held at the same time.
        threads: that copy; by default as many as there are cores, at most 8.
    """

    _synchronize_after_execute = False

    def __init__(
        self,
        config: StagingOptions | None = None,
        *,
        arenas: int = 1,
        threads: int | None = None,
    ) -> None:
        self.config = config if config is not None else StagingOptions()
        self.arenas = ArenaStager(arenas=arenas, threads=threads, pin=self.config.use_pinned_memory)
        self._last: StagedState | None = None

    def begin(
        self,
        state_dict: Mapping[str, Any],
        *,
        background: bool | None = None,
        group: GroupRanks | None = None,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        check: Check = no_check,
    ) -> StagedState:
        """Stage ``state_dict`` into an arena that stays its own until ``release``.

        Objects are copied before this returns; tensors too, unless in the background.

        Args:
            background: by default ``config.use_async_staging``.
            group, flatten_state_dict, flatten_sharded_tensors: see ``describe_state``.
            check: see ``ArenaStager.begin``.
        Raises:
            UnsupportedStateError: naming the key, for what a save would refuse.
            StagingError: too little memory; nothing was touched.
        """
        described = describe_state(
            state_dict,
            group=group,
            flatten_state_dict=flatten_state_dict,
            flatten_sharded_tensors=flatten_sharded_tensors,
        )
        if background is None:
            background = self.config.use_async_staging
        staging = self.arenas.begin(described.sources, background=background, check=check)
        return StagedState(state_dict=described.build(staging.tensors()), staging=staging)

    def stage(
        self, state_dict: STATE_DICT_TYPE, **kwargs: Any
    ) -> Future[STATE_DICT_TYPE] | STATE_DICT_TYPE:
        """The staged state dict, or with ``use_async_staging`` a future of it.

        Args:
            kwargs: as for ``begin``.
        """
        if self._last is not None:
            self._last.release()
        background = kwargs.setdefault("background", self.config.use_async_staging)
        self._last = staged = self.begin(state_dict, **kwargs)
        if not background:
            return staged.state_dict
        result: Future[STATE_DICT_TYPE] = Future()
        result.set_running_or_notify_cancel()

        def finish(completion: Future[None]) -> None:
            error = completion.exception()
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(staged.state_dict)

        staged.completion.add_done_callback(finish)
        return result

    def synchronize_staging(self) -> None:
        """Return when what ``stage`` was given last may change; raise what staging failed with."""
        if self._last is not None:
            self._last.wait()

    def warmup(self, state_dict: Mapping[str, Any], *, check: Check = no_check) -> None:
        """Have memory for ``state_dict`` ready, touched, so that the first save is as fast as the
        later ones."""
        self.arenas.warmup(describe_state(state_dict).sources.tensors, check=check)

    def close(self) -> None:
        """Wait for what is under way and give memory back; state dicts that were handed out stay
        valid. Any number of times."""
        if self._last is not None:
            self._last.release()
            self._last = None
        self.arenas.close()


class BlockingAsyncStager(AsyncStager):
    """Stages before it returns, each time into fresh memory unless told to keep it.

    Args:
        cache_staged_state_dict: reuse the memory; a state dict returned before is overwritten.
        type_check: refuse leaves that are neither tensors nor numbers, strings, bytes or None.
    """

    _synchronize_after_execute = False

    def __init__(self, cache_staged_state_dict: bool = False, type_check: bool = False) -> None:
        self.cache_staged_state_dict = cache_staged_state_dict
        self.type_check = type_check
        self._kept: DefaultStager | None = None

    def stage(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        """The staged state dict."""
        if self.type_check:
            _refuse_objects(state_dict)
        if not self.cache_staged_state_dict:
            with DefaultStager() as stager:
                fresh = stager.begin(state_dict)
                fresh.release()  # its views keep the memory
                return fresh.state_dict
        if self._kept is None:
            self._kept = DefaultStager()
        kept = self._kept.begin(state_dict)
        kept.release()
        return kept.state_dict

    def synchronize_staging(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Give back the memory that was kept."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None


def _refuse_objects(state_dict: Mapping[str, Any]) -> None:
    for leaf in flatten(resolve_stateful(state_dict)[0]).leaves:
        value = leaf.value
        tensor = isinstance(value, torch.Tensor) or has_checkpoint_methods(value)
        if not tensor and type(value) not in _CHECKED_TYPES:
            raise UnsupportedStateError(
                f"a {type(value).__qualname__} is not a type that type_check=True lets through",
                tensor=leaf.fqn,
                hint="leave it out, or stage without type_check",
            )
