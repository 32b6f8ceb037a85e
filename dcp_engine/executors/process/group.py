"""The process group of the workers.

Belongs here: making torch.distributed's default group in a worker process, and making it anew. Does
not belong here: which generation it is, which the parents agree on.

Every generation has a prefix of its own on the trainer's store. Without it a new worker would find
the addresses of the dead one's peers, and one of them would wait until a timeout. Generations are
counted from 1: 0 is the session of the parents.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dcp_engine.closing import Closing
from dcp_engine.coordination.address import connect
from dcp_engine.coordination.interface import SessionHandle
from dcp_engine.coordination.store import StoreSessionHandle
from dcp_engine.errors import CoordinationError, UsageError

__all__ = ["WorkerGroup"]

_stores: Any = dist
"""The store classes, which torch's type stubs know only in part."""


class WorkerGroup(Closing):
    """The default process group of this process, which stands for a rank of its parent's group.

    Args:
        handle: the parent's session. One of a single rank needs no store: the worker makes one.
        timeout: seconds for the workers to find each other, and for a collective of theirs.
    """

    def __init__(self, handle: SessionHandle, *, timeout: float = 300.0) -> None:
        self._handle = handle
        self._timeout = timeout
        self._generation = 0
        self._store: Any = None

    @property
    def generation(self) -> int:
        """Of the group that there is; 0 if there is none."""
        return self._generation

    def ensure(self, generation: int) -> None:
        """Have the group of ``generation``, a gloo group, as the default group.

        Nothing if it is there. Else the one before is left, and all workers of the generation have
        to come here.

        Raises:
            UsageError: the generation has passed, or this process has a default group that is not
                this object's.
            CoordinationError: kind ``timeout``: not all workers came; ``store_lost``. There is no
                group then, and the next try needs the next generation.
        """
        if generation == self._generation and dist.is_initialized():
            return
        if generation <= self._generation:
            raise UsageError(
                f"generation {generation} of the workers' process group has passed: the present "
                f"one is {self._generation}"
            )
        self.close()
        if dist.is_initialized():
            raise UsageError("this process has a default process group of somebody else's")
        self._generation = generation
        self._store = store = self._connect()
        try:
            dist.init_process_group(
                "gloo",
                store=store,
                rank=self._handle.rank,
                world_size=self._handle.world_size,
                timeout=timedelta(seconds=self._timeout),
            )
        except RuntimeError as error:
            self._store = None
            reason = str(error).split("Exception raised from", 1)[0].strip()
            raise CoordinationError(
                f"the workers did not find each other in generation {generation} within "
                f"{self._timeout:.3g} s: {reason}",
                kind="timeout",
                rank=self._handle.rank,
            ) from error

    def _connect(self) -> Any:
        handle = self._handle
        if handle.world_size == 1:
            return _stores.HashStore()
        if not isinstance(handle, StoreSessionHandle):
            raise UsageError(f"a {type(handle).__name__} names no store for a process group")
        base = connect(handle.address, self._timeout)
        return _stores.PrefixStore(handle.prefix(self._generation), base)

    def close(self) -> None:
        """Leave the group, whatever became of the others. Any number of times."""
        if self._store is None:
            return
        self._store = None
        if dist.is_initialized():
            dist.destroy_process_group()
