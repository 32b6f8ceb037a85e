"""One save: the order of the steps.

``save`` picks between two ways: ``columnar`` when planner, writer and plan are all the engine's
own, ``item_based`` (DCP's life cycle) otherwise; ``collective_free`` is the columnar way without
a word between ranks. Belongs here: order, and what happens after a failure. Does not belong here:
planning, bytes, waiting.
"""

from __future__ import annotations

from dcp_engine.saver.options import SaveOptions
from dcp_engine.saver.plan_memory import PlanMemory
from dcp_engine.saver.save import save

__all__ = ["PlanMemory", "SaveOptions", "save"]
