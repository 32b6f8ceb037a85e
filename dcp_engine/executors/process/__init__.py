"""A worker process: one handler, asked over a socket, one request at a time.

``parent`` and ``supervisor`` have the side that owns the process, ``worker`` the side that runs in
it, ``protocol`` and ``channel`` what goes between them; ``group`` gives the worker a process group
of its own. Nothing here knows what the requests mean.
"""

from dcp_engine.executors.process.failure import WorkerError, WorkerFailure, packed, unpacked
from dcp_engine.executors.process.handler import Handler, WorkerContext, WorkerRequest
from dcp_engine.executors.process.main_module import loads
from dcp_engine.executors.process.parent import WorkerProcess
from dcp_engine.executors.process.pickles import dumps
from dcp_engine.executors.process.settings import WorkerSettings

__all__ = [
    "Handler",
    "WorkerContext",
    "WorkerError",
    "WorkerFailure",
    "WorkerProcess",
    "WorkerRequest",
    "WorkerSettings",
    "dumps",
    "loads",
    "packed",
    "unpacked",
]
