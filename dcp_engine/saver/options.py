"""What a caller may choose about one save."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dcp_engine.coordination.interface import Deadlines

__all__ = ["ASYNC_SAVE_PHASES", "SAVE_PHASES", "ExtraContent", "SaveOptions"]

SAVE_PHASES = ("agree", "plan", "compare", "write", "commit")
"""What ``phase_timeouts`` may name."""
ASYNC_SAVE_PHASES = ("staging", "group", "join", *SAVE_PHASES)
"""What it may name for asynchronous saves: workers agree on their process group first."""

ExtraContent = bytes | str | os.PathLike[str]
"""Bytes, text (stored as UTF-8), or the path of a file to copy."""


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """Choices of one save; the public ``save`` documents them."""

    deadlines: Deadlines = field(default_factory=Deadlines)
    coordinator_rank: int = 0
    use_collectives: bool = True
    extra_files: Mapping[str, ExtraContent] = field(default_factory=dict)
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    save_id: str | None = None
    """Collective-free saves: the token that all ranks share."""
    keep_replaced: bool = False
    strict_replicas: bool = False
