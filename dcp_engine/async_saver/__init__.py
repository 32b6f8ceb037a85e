"""A save that runs off the critical path.

Training waits while its state is copied to staging memory; a thread of this process, or a worker
process, does the rest. Belongs here: what the caller gets back (``response``), the copy that is
saved (``snapshot``), and who saves it (``saver``, ``in_thread``, ``in_process``, ``worker``). Does
not belong here: copying (``staging``), the order of a save's steps (``saver`` beside this package),
threads and processes as such (``executors``).
"""

from __future__ import annotations

from dcp_engine.async_saver.job import SaveJob
from dcp_engine.async_saver.response import AsyncCheckpointerType, AsyncSaveResponse, Progress
from dcp_engine.async_saver.saver import AsyncSaver

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "AsyncSaver", "Progress", "SaveJob"]
