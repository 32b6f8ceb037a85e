"""One load: the order of the steps.

``load`` picks between ``columnar`` (the engine's own planner and reader) and ``item_based``
(DCP's life cycle). Belongs here: order, retries after a replaced checkpoint, putting loaded values
back. Does not belong here: planning, bytes, waiting.
"""

from __future__ import annotations

from dcp_engine.loader.load import load
from dcp_engine.loader.options import LoadOptions
from dcp_engine.loader.report import LoadReport

__all__ = ["LoadOptions", "LoadReport", "load"]
