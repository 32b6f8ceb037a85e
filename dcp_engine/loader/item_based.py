"""A load in DCP's life cycle: for a planner or a reader that is not the engine's own."""

from __future__ import annotations

import pickle
from typing import Any

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.error_context import located
from dcp_engine.errors import InvalidPlanError
from dcp_engine.loader.report import LoadReport
from dcp_engine.planner import LoadPlanner
from dcp_engine.storage import StorageReader

__all__ = ["load_items"]


def load_items(
    operation: Operation,
    resolved: dict[str, Any],
    *,
    checkpoint_id: str | None,
    checkpoint: str,
    reader: StorageReader,
    planner: LoadPlanner,
) -> LoadReport:
    """Fill ``resolved`` on this rank; the planner changes it in place."""

    def local_plan() -> bytes:
        with located(checkpoint=checkpoint, rank=operation.rank):
            reader.reset(checkpoint_id)
            metadata = reader.read_metadata()
            planner.set_up_planner(
                state_dict=resolved, metadata=metadata, is_coordinator=operation.is_coordinator
            )
            reader.set_up_storage_reader(metadata, operation.is_coordinator)
            return pickle.dumps(reader.prepare_local_plan(planner.create_local_plan()))

    def global_plan(messages: list[bytes]) -> Decision:
        with located(checkpoint=checkpoint, rank=operation.rank):
            plans = planner.create_global_plan([pickle.loads(m) for m in messages])
            plans = reader.prepare_global_plan(plans)
            if len(plans) != operation.world_size:
                raise InvalidPlanError(
                    f"{type(planner).__name__} and {type(reader).__name__} made {len(plans)} "
                    f"plans for {operation.world_size} ranks",
                    checkpoint=checkpoint,
                )
            return Decision(per_rank=[pickle.dumps(plan) for plan in plans])

    def read() -> bytes:
        with located(checkpoint=checkpoint, rank=operation.rank):
            plan = planner.finish_plan(pickle.loads(own))
            operation.check()
            reader.read_data(plan, planner).wait()
            return b""

    _, own = operation.step("plan", local_plan, global_plan)
    operation.step("read", read, lambda _: Decision())
    return LoadReport(save_id=None)
