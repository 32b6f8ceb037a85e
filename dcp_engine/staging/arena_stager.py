"""One staging: tensors copied into an arena, at once or in the background.

Belongs here: the order of the steps and what a staging promises. Does not belong here: state
dicts (``staged_state``), and DCP's stager classes (``stagers``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass

import torch

from dcp_engine.closing import Closing
from dcp_engine.errors import StagingError
from dcp_engine.staging import pages
from dcp_engine.staging.arena import Arena
from dcp_engine.staging.copier import Copier
from dcp_engine.staging.device_copy import Ready
from dcp_engine.staging.layout import ArenaLayout, make_layout
from dcp_engine.staging.pool import ArenaPool
from dcp_engine.staging.versions import VersionAlarm
from dcp_engine.storage import Check

__all__ = ["ArenaStager", "Sources", "Staging", "no_check"]

logger = logging.getLogger(__name__)

_MAP_SLICE = 8 << 20
"""Bytes: while one is mapped, whoever else in this process wants to map something has to wait."""


def no_check() -> None:
    """Nothing to look at between slices."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """What is to be staged."""

    tensors: Sequence[torch.Tensor]
    """Plain strided tensors without autograd, as adapters and ``LocalSource`` hold them."""
    names: Sequence[str]
    """(N,) fully qualified names, for messages."""
    watched: Sequence[tuple[str, torch.Tensor]] = ()
    """Further tensors whose version counters tell of changes: the outer ones of sharded tensors."""


class Staging:
    """A copy that is made, or under way, in an arena that is its own until ``release``.

    Attributes:
        completion: done when the copy is whole and the sources may change, or failed: then there
            is nothing in the arena that could be used. Cannot be cancelled.
        layout: where each source lies; ``layout.views`` makes tensors of it in any process.
        arena: the memory.
    """

    def __init__(self, arena: Arena, layout: ArenaLayout, pool: ArenaPool) -> None:
        self.arena = arena
        self.layout = layout
        self.completion: Future[None] = Future()
        self.completion.set_running_or_notify_cancel()
        self.bytes_total = layout.copied_bytes
        self._bytes_done = 0
        self._pool = pool
        self._released = False
        self._lock = threading.Lock()

    @property
    def bytes_done(self) -> int:
        """Bytes copied so far."""
        return self._bytes_done

    def tensors(self) -> list[torch.Tensor]:
        """The staged tensors, row by row; what they hold is right after ``completion``."""
        return self.layout.views(self.arena)

    def wait(self, timeout: float | None = None) -> None:
        """Return when the copy is whole; raise what it failed with.

        Raises ``StagingError(kind="timeout")`` after ``timeout`` seconds.
        """
        try:
            self.completion.result(timeout)
        except FutureTimeout:
            if self.completion.done():
                raise  # the copy's own error
            raise StagingError(
                f"staging took longer than {timeout} s: {self.bytes_done:,} of "
                f"{self.bytes_total:,} bytes are copied",
                kind="timeout",
                hint="wait longer",
            ) from None

    def release(self) -> None:
        """Nobody reads the staged values any more: the arena may take the next ones, as soon as
        the copy is over. Any number of times."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self.completion.add_done_callback(lambda _: self._pool.give_back(self.arena))

    def _copied(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_done += nbytes


class ArenaStager(Closing):
    """Stages tensors into reused arenas.

    Args:
        arenas: how many stagings may hold memory at the same time.
        threads: that copy; by default as many as there are cores, at most 8.
        pin: register arenas with CUDA, where there is CUDA.
    """

    def __init__(self, *, arenas: int = 1, threads: int | None = None, pin: bool = True) -> None:
        self._copier = Copier(threads)
        self._pool = ArenaPool(arenas, lambda: Arena(pin=pin))
        self._background = ThreadPoolExecutor(1, "dcp_engine-staging")
        self._closed = False

    def begin(
        self, sources: Sources, *, background: bool = False, check: Check = no_check
    ) -> Staging:
        """Stage ``sources``.

        Without ``background`` the copy is whole on return. With it, the sources must not change
        before ``completion`` is done.

        Args:
            check: called while waiting for an arena, and between slices of at most 16 MiB; in
                the background by another thread. What it raises ends the staging.
        Raises:
            StagingError: too little memory (``kind="out_of_memory"``); nothing was touched.
        """
        layout = make_layout(sources.tensors)
        arena = self._pool.take(layout.size, check)
        staging = Staging(arena, layout, self._pool)
        try:
            arena.reserve(layout.size)
            ready = self._copier.mark(sources.tensors)
            if background:
                names = zip(sources.names, sources.tensors, strict=True)
                alarm = VersionAlarm([*sources.watched, *names])
                self._background.submit(self._finish, staging, sources, ready, alarm, check)
                return staging
            self._copy(staging, sources, ready, check)
        except BaseException as error:
            staging.release()
            staging.completion.set_exception(error)
            raise
        staging.completion.set_result(None)
        return staging

    def warmup(self, tensors: Sequence[torch.Tensor], *, check: Check = no_check) -> None:
        """Have an arena with room for ``tensors``, every page of it in memory."""
        size = make_layout(tensors).size
        arena = self._pool.take(size, check)
        try:
            arena.reserve(size)
            arena.touch(size, executor=self._copier.executor)
        finally:
            self._pool.give_back(arena)

    def present(self) -> int:
        """Bytes of host memory that the arenas take."""
        return self._pool.present()

    def free_arenas(self) -> list[Arena]:
        """The arenas that nobody uses now."""
        return self._pool.free()

    def close(self) -> None:
        """Wait for what is under way, then give back all memory that nobody reads. Any number of
        times."""
        self._closed = True
        self._background.shutdown()
        self._copier.close()
        self._pool.close()

    def _finish(
        self,
        staging: Staging,
        sources: Sources,
        ready: Ready,
        alarm: VersionAlarm,
        check: Check,
    ) -> None:
        try:
            self._copy(staging, sources, ready, check)
            alarm.check()
        except BaseException as error:
            logger.debug("staging in the background failed", exc_info=True)
            staging.completion.set_exception(error)
        else:
            staging.completion.set_result(None)

    def _copy(self, staging: Staging, sources: Sources, ready: Ready, check: Check) -> None:
        first = staging.arena.takes_first_writes
        self._copier.copy(
            sources.tensors,
            staging.layout,
            staging.arena,
            ready=ready,
            check=check,
            copied=staging._copied,
            first_writes=first,
        )
        if first:
            memory = staging.arena.view(0, staging.layout.size)
            with suppress(RuntimeError):  # the interpreter ends: there will be no other copy
                self._background.submit(self._map, memory)

    def _map(self, memory: torch.Tensor) -> None:
        """What was written is mapped while nobody waits for it, for the next copy."""
        for at in range(0, memory.numel(), _MAP_SLICE):
            if self._closed:
                return
            pages.map_present(memory[at : at + _MAP_SLICE])
