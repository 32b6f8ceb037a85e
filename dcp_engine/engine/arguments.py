"""What the arguments of an engine's operations mean, whatever the operation.

Belongs here: times, places and save ids as callers give them, turned into what the layers below
take. Does not belong here: running anything (``engine``), and the ranks (``sessions``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import EllipsisType

from dcp_engine.async_saver import AsyncCheckpointerType
from dcp_engine.coordination.interface import Deadlines
from dcp_engine.errors import UsageError

__all__ = [
    "CheckpointId",
    "TimeLimits",
    "Timeout",
    "checkpointer_type",
    "required_place",
    "text_of",
]

Timeout = float | timedelta | None
"""Seconds, or a timedelta; None waits forever."""
CheckpointId = str | os.PathLike[str] | None


@dataclass(frozen=True, kw_only=True)
class TimeLimits:
    """An engine's own, for operations that give none (``...``)."""

    timeout: Timeout
    stall_timeout: Timeout

    def deadlines(
        self,
        timeout: Timeout | EllipsisType,
        stall_timeout: Timeout | EllipsisType,
        phases: Mapping[str, float] | None,
        known: Sequence[str],
    ) -> Deadlines:
        """Those of one operation, whose phases are ``known``.

        Raises ``UsageError`` for a phase that is not.
        """
        unknown = [phase for phase in phases or {} if phase not in known]
        if unknown:
            raise UsageError(
                f"phase_timeouts names {unknown}, which are no phases of this operation",
                hint=f"its phases are {', '.join(known)}",
            )
        return Deadlines(
            timeout=_seconds(self.timeout if isinstance(timeout, EllipsisType) else timeout),
            stall_timeout=_seconds(
                self.stall_timeout if isinstance(stall_timeout, EllipsisType) else stall_timeout
            ),
            phases=dict(phases or {}),
        )


def _seconds(value: Timeout) -> float | None:
    return value.total_seconds() if isinstance(value, timedelta) else value


def checkpointer_type(given: object) -> AsyncCheckpointerType:
    """The one that ``given`` names: itself, its value, or the member of torch's enumeration.

    Raises ``UsageError`` where there is none.
    """
    try:
        return AsyncCheckpointerType(getattr(given, "value", given))
    except ValueError:
        known = " or ".join(f"AsyncCheckpointerType.{kind.name}" for kind in AsyncCheckpointerType)
        raise UsageError(f"async_checkpointer_type is {given!r}", hint=f"it is {known}") from None


def text_of(checkpoint_id: CheckpointId) -> str | None:
    """The checkpoint's path or URL, if one was given."""
    return None if checkpoint_id is None else os.fspath(checkpoint_id)


def required_place(checkpoint_id: CheckpointId, other: str) -> str:
    """``text_of``, where ``other``, which would know it too, was not given."""
    if checkpoint_id is None:
        raise UsageError(f"neither checkpoint_id nor {other} was given", hint="give one of them")
    return os.fspath(checkpoint_id)
