"""A save in DCP's life cycle: for a planner or a writer that is not the engine's own.

The same steps, deadlines, outcome and failure reports as ``columnar``; plans and results travel
as pickled items, at the speed of whoever made them.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.error_context import located
from dcp_engine.errors import ConflictError, InvalidPlanError
from dcp_engine.format.names import new_save_id
from dcp_engine.metadata import Metadata, MetadataIndex
from dcp_engine.native_storage import ColumnarWriter, SaveTicket
from dcp_engine.plan import SavePlan
from dcp_engine.planner import SavePlanner
from dcp_engine.saver.options import SaveOptions
from dcp_engine.saver.outcome import commit_once, settle_failure
from dcp_engine.state.flatten import resolve_stateful
from dcp_engine.storage import StorageWriter, WriteResult

__all__ = ["save_items"]


def save_items(
    operation: Operation,
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | None,
    checkpoint: str,
    writer: StorageWriter,
    planner: SavePlanner,
    is_coordinator: bool,
    rank: int,
    options: SaveOptions,
    ticket: Callable[[str], SaveTicket],
) -> Metadata:
    """Carry one save through on this rank.

    ``operation`` is of one rank when the save is collective-free; ``is_coordinator`` and ``rank``
    are then still the rank's own.
    """
    global_metadata: list[Metadata] = []

    def local_plan() -> bytes:
        with located(checkpoint=checkpoint, rank=rank):
            writer.reset(checkpoint_id)
            resolved, _ = resolve_stateful(state_dict)
            planner.set_up_planner(
                state_dict=resolved,
                storage_meta=writer.storage_meta(),
                is_coordinator=is_coordinator,
            )
            if isinstance(writer, ColumnarWriter):
                writer.set_up_storage_writer(
                    is_coordinator, rank=rank, ticket=ticket(options.save_id or new_save_id())
                )
            else:
                writer.set_up_storage_writer(is_coordinator)
            return pickle.dumps(writer.prepare_local_plan(planner.create_local_plan()))

    def global_plan(messages: list[bytes]) -> Decision:
        with located(checkpoint=checkpoint, rank=rank):
            plans, metadata = planner.create_global_plan([pickle.loads(m) for m in messages])
            plans = writer.prepare_global_plan(plans)
            if len(plans) != operation.world_size:
                raise InvalidPlanError(
                    f"{type(planner).__name__} and {type(writer).__name__} made {len(plans)} "
                    f"plans for {operation.world_size} ranks",
                    checkpoint=checkpoint,
                )
            global_metadata.append(metadata)
            return Decision(per_rank=[pickle.dumps(plan) for plan in plans])

    def write() -> bytes:
        with located(checkpoint=checkpoint, rank=rank):
            plan = planner.finish_plan(pickle.loads(own))
            operation.check()
            results = writer.write_data(plan, planner).wait()
            _compare_with_plan(plan, results, checkpoint=checkpoint, rank=rank)
            return pickle.dumps(results)

    def finish(messages: list[bytes]) -> Decision:
        with located(checkpoint=checkpoint, rank=rank):
            if not global_metadata:
                raise ConflictError("the coordinator lost its metadata", kind="out_of_step")
            metadata = replace(global_metadata[0], storage_meta=writer.storage_meta())
            results: list[list[WriteResult]] = [pickle.loads(m) for m in messages]
            commit_once(operation, lambda: writer.finish(metadata, results))
            return Decision(common=pickle.dumps(metadata))

    try:
        _, own = operation.step("plan", local_plan, global_plan)
        common, _ = operation.step("write", write, finish, decide_phase="commit")
    except BaseException as error:
        settle_failure(
            operation,
            error,
            abort=writer.abort,
            leave_in_doubt=writer.leave_in_doubt,
            checkpoint=checkpoint,
        )
        raise
    metadata: Metadata = pickle.loads(common)
    return metadata


def _compare_with_plan(
    plan: SavePlan, results: list[WriteResult], *, checkpoint: str, rank: int
) -> None:
    """Every planned item must have exactly one result; a writer that lost one must not commit."""
    planned: Counter[MetadataIndex] = Counter(item.index for item in plan.items)
    written: Counter[MetadataIndex] = Counter(result.index for result in results)
    if planned == written:
        return
    missing = [index.fqn for index in (planned - written)]
    extra = [index.fqn for index in (written - planned)]
    raise InvalidPlanError(
        f"{len(plan.items)} items were planned and {len(results)} reported as written; "
        f"missing {missing[:5]}, not planned {extra[:5]}",
        kind="results_mismatch",
        checkpoint=checkpoint,
        tensor=(missing or extra)[0],
        rank=rank,
        hint="nothing was committed; the storage writer must return one WriteResult per item",
    )
