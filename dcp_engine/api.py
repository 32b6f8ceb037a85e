"""``CheckpointException`` under the name of torch's module of it. The class is in ``errors``."""

from __future__ import annotations

from dcp_engine.errors import CheckpointException, WrappedException

__all__ = ["WRAPPED_EXCEPTION", "CheckpointException"]

WRAPPED_EXCEPTION = WrappedException
