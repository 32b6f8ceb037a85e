"""Staging: a copy of a rank's state in memory of its own, so that training may go on.

Belongs here: the memory (``arena``, ``pool``), where things lie in it (``layout``), the copy
(``copier``), state dicts of staged values (``staged_state``), and the stagers, which are here under
DCP's names too. Does not belong here: saving (``saver``) and the processes and threads that a save
runs in (``executors``).
"""

from __future__ import annotations

from dcp_engine.staging.stagers import (
    AsyncStager,
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)

__all__ = ["AsyncStager", "BlockingAsyncStager", "DefaultStager", "StagingOptions"]
