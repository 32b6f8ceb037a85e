"""What owns resources: ``Engine``, and the module functions over a default one."""

from __future__ import annotations

from dcp_engine.engine.default import default_engine
from dcp_engine.engine.engine import Engine
from dcp_engine.engine.functions import async_save, load, open_checkpoint, read_extra, save
from dcp_engine.engine.lookup import latest, verify

__all__ = [
    "Engine",
    "async_save",
    "default_engine",
    "latest",
    "load",
    "open_checkpoint",
    "read_extra",
    "save",
    "verify",
]
