"""``save``, ``async_save`` and what it takes and returns, under the name of torch's module of them.

They are in ``engine`` and ``async_saver``.
"""

from __future__ import annotations

from dcp_engine.async_saver import AsyncCheckpointerType, AsyncSaveResponse
from dcp_engine.engine import async_save, save

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "async_save", "save"]
