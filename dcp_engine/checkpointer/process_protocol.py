"""What a checkpoint process and its child say to each other.

Belongs here: the types. Does not belong here: how bytes get across (``executors.process``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dcp_engine.checkpointer.types import RankInfo

__all__ = ["ChildSettings", "RequestType", "SentState", "WorkerRequest", "WorkerResponse"]


class RequestType(Enum):
    """What the child is asked to do."""

    PING = "ping"
    """Answer."""
    WRITE_CHECKPOINT = "write_checkpoint"
    """Write. ``payload``: ``path``, ``state`` (a ``SentState``, or the exception for which this
    rank has nothing to write), ``kwargs`` and ``turn`` (a ``WriteTurn``)."""
    TERMINATE_PROCESS = "exit"
    """Close the writer, and expect nothing more."""


@dataclass
class WorkerRequest:
    """From the parent."""

    request_type: RequestType
    payload: dict[str, Any]


@dataclass
class WorkerResponse:
    """From the child. A request that failed has no response: what the child raised, the parent
    raises."""

    request_type: RequestType
    success: bool
    error_msg: str | None = None
    payload: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SentState:
    """A state dict whose tensors are places in an arena that both processes map."""

    pickled: bytes
    """By ``staging.staged_pickle``."""
    shared: frozenset[str]
    """See ``StagedStateDict``."""
    arena: int
    """Which one: its number with this child. A descriptor comes along the first time."""
    arena_size: int
    """In bytes."""
    arenas: frozenset[int]
    """All that the parent still has: the child lets go of others."""


@dataclass(frozen=True, kw_only=True)
class ChildSettings:
    """What the child makes its writer of."""

    rank_info: RankInfo
    subprocess_init_fn: Callable[..., Any]
    subprocess_init_args: tuple[Any, ...]
    checkpoint_writer_init_fn: Callable[..., Any]
    checkpoint_writer_init_args: dict[str, Any]
