"""What a worker process is started with.

Belongs here: the settings and their defaults, with the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["DEFAULT_NICE", "MAX_NICE", "WorkerSettings"]

MAX_NICE = 19
DEFAULT_NICE = 10
"""At 10 a worker gets a tenth of a processor that the training wants too, and all of one that is
idle. At 15, a thirtieth, a save of a second took half a minute where training filled all
processors, and cost it no less in all (``docs/async.md``)."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How to start a worker process. Times are in seconds."""

    handler: str
    """``package.module:factory``, imported in the worker; called as ``factory(init, context)``."""
    init: bytes = b""
    """Given to the factory, opaque to everything else."""
    name: str
    """For messages, and the name of the process in ``top``."""
    rank: int = 0
    """For messages."""
    nice: int = DEFAULT_NICE
    """Added to the parent's nice value once the worker is up."""
    idle_io: bool = True
    """Read and write in the idle class: after everybody else, where the disk's scheduler knows
    classes."""
    start_timeout: float = 60.0
    """Until the factory has returned; after it the process is killed."""
    shutdown_timeout: float = 30.0
    """For ``close``: the request in flight and the handler's own ``close``; after it the process
    is killed."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set in the worker, over the parent's environment and what the worker itself would set."""
