"""Fills checkpoint and rank into errors that were raised where neither was known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dcp_engine.errors import CheckpointError

__all__ = ["located"]


@contextmanager
def located(*, checkpoint: object | None, rank: int) -> Iterator[None]:
    """Complete every ``CheckpointError`` that leaves the block; other errors pass unchanged."""
    try:
        yield
    except CheckpointError as error:
        error.with_context(checkpoint=checkpoint, rank=rank)
        raise
