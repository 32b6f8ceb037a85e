"""Opening the session that fits a process group.

Belongs here: the choice between the implementations, and nothing else.
"""

from __future__ import annotations

import torch.distributed as dist

from dcp_engine.coordination.collective import CollectiveSession
from dcp_engine.coordination.group import (
    describe_group,
    has_cpu_backend,
    store_access,
)
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Session
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.single import SingleSession
from dcp_engine.coordination.store import StoreSession
from dcp_engine.errors import UsageError

__all__ = ["open_session"]


def open_session(
    process_group: dist.ProcessGroup | None = None,
    *,
    no_dist: bool = False,
    connect_timeout: float = 300.0,
    rhythm: Rhythm | None = None,
) -> Session:
    """Meet the other ranks of the group. Every rank of it has to call this, no other may.

    Args:
        process_group: who takes part; None is the default group, or this process alone where
            ``torch.distributed`` is not initialized.
        no_dist: this process alone, whatever is initialized.
        connect_timeout: seconds to wait for the other ranks.
        rhythm: how often the ranks speak; by default what fits the size of the group.

    Raises:
        UsageError: this process is not in the group, or the group has neither a store nor a CPU
            backend.
        CoordinationError: kind ``timeout`` naming the ranks that did not come, or ``store_lost``.
    """
    initialized = dist.is_available() and dist.is_initialized()
    if no_dist or (process_group is None and not initialized):
        return SingleSession(run_identity(""))
    info = describe_group(process_group)
    identity = run_identity(info.name)
    if info.world_size == 1:
        return SingleSession(identity)
    access = store_access(process_group)
    if access is not None:
        return StoreSession.open(
            access.connect,
            location=access.location,
            address=access.address,
            rank=info.rank,
            world_size=info.world_size,
            identity=identity,
            timeout=connect_timeout,
            rhythm=rhythm,
        )
    if has_cpu_backend(process_group):
        return CollectiveSession(process_group, info, identity)
    raise UsageError(
        "the process group has neither a store that can be reached nor a CPU backend",
        hint="initialize it with a TCPStore or a FileStore, or pass no_dist=True",
    )
