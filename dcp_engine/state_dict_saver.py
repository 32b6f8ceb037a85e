"""``save`` under the name of torch's module of it. The function is in ``engine``."""

from __future__ import annotations

from dcp_engine.engine import save

__all__ = ["save"]
