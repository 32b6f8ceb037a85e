"""A save in DCP's life cycle: for a planner or a writer that is not the engine's own.

The same steps, deadlines, outcome and failure reports as ``columnar``; plans and results travel
as pickled items, at the speed of whoever made them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.default_planner import (
    DefaultSavePlanner,
    described_values,
    stores_objects_itself,
)
from dcp_engine.error_context import located
from dcp_engine.errors import ConflictError, InvalidPlanError, UnsupportedStateError
from dcp_engine.foreign_calls import ObjectMail, takes_keywords
from dcp_engine.format.names import new_save_id
from dcp_engine.format.object_codec import encode_object
from dcp_engine.metadata import Metadata, MetadataIndex
from dcp_engine.native_storage import ColumnarWriter, SaveTicket
from dcp_engine.plan import SavePlan
from dcp_engine.planner import SavePlanner
from dcp_engine.planning.replicas import needs_details, summarise
from dcp_engine.saver.compare import compare_replicas, digest_replicas
from dcp_engine.saver.options import SaveOptions
from dcp_engine.saver.outcome import commit_once, heeding_the_first_failure, settle_failure
from dcp_engine.state.flatten import resolve_stateful
from dcp_engine.state.values import ObjectValue
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
    mail = ObjectMail(operation.world_size)
    strict = options.strict_replicas or getattr(planner, "strict_replicas", False)
    global_metadata: list[Metadata] = []
    reported: list[bool] = []
    compared: dict[str, int] = {}

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
                writer.announce(ticket(options.save_id or new_save_id()))
            _set_up_writer(writer, is_coordinator, rank, options.use_collectives)
            plan = planner.create_local_plan()
            if isinstance(planner, DefaultSavePlanner):
                compared.update(_digests_of_items(planner, plan, strict=strict))
            return mail.send((summarise(compared), writer.prepare_local_plan(plan)))

    def global_plan(messages: list[bytes]) -> Decision:
        with located(checkpoint=checkpoint, rank=rank):
            offers: list[tuple[bytes, SavePlan]] = [mail.open(message) for message in messages]
            plans, metadata = planner.create_global_plan([plan for _, plan in offers])
            plans = writer.prepare_global_plan(plans)
            if len(plans) != operation.world_size:
                raise InvalidPlanError(
                    f"{type(planner).__name__} and {type(writer).__name__} made {len(plans)} "
                    f"plans for {operation.world_size} ranks",
                    checkpoint=checkpoint,
                )
            global_metadata.append(metadata)
            doubt = needs_details([summary for summary, _ in offers])
            return Decision(
                common=b"1" if doubt else b"", per_rank=[mail.send(plan) for plan in plans]
            )

    def write() -> bytes:
        with heeding_the_first_failure(operation), located(checkpoint=checkpoint, rank=rank):
            plan = planner.finish_plan(mail.open(own))
            operation.check()
            results = writer.write_data(plan, planner).wait()
            _compare_with_plan(plan, results, checkpoint=checkpoint, rank=rank)
            message = mail.send(results)
            reported.append(True)
            return message

    def finish(messages: list[bytes]) -> Decision:
        with located(checkpoint=checkpoint, rank=rank):
            if not global_metadata:
                raise ConflictError("the coordinator lost its metadata", kind="out_of_step")
            metadata = replace(global_metadata[0], storage_meta=writer.storage_meta())
            results: list[list[WriteResult]] = [mail.open(message) for message in messages]
            commit_once(operation, lambda: writer.finish(metadata, results))
            return Decision(common=mail.send(metadata))

    try:
        doubt, own = operation.step("plan", local_plan, global_plan)
        if doubt:
            compare_replicas(operation, compared, strict=strict, checkpoint=checkpoint)
        common, _ = operation.step("write", write, finish, decide_phase="commit")
    except BaseException as error:
        settle_failure(
            operation,
            error,
            abort=writer.abort,
            leave_in_doubt=writer.leave_in_doubt,
            reported=bool(reported),
            checkpoint=checkpoint,
        )
        raise
    metadata: Metadata = mail.open(common)
    return metadata


def _set_up_writer(
    writer: StorageWriter, is_coordinator: bool, rank: int, use_collectives: bool
) -> None:
    if takes_keywords(writer.set_up_storage_writer):
        writer.set_up_storage_writer(is_coordinator, rank=rank, use_collectives=use_collectives)
    else:
        writer.set_up_storage_writer(is_coordinator)


def _digests_of_items(
    planner: DefaultSavePlanner, plan: SavePlan, *, strict: bool
) -> dict[str, int]:
    """Digests of what ``plan`` offers under names that other ranks may offer too.

    The values as they lie in the planner's state dict: what the planner makes of them later it
    makes on all ranks alike. Raises ``UnsupportedStateError`` for an object that cannot be
    stored, also where another rank would write it.
    """
    offered = {item.index.fqn for item in plan.items}
    values = [value for value in described_values(planner) if value.fqn in offered]
    objects = {}
    for value in values:
        if isinstance(value, ObjectValue):
            try:
                objects[value.fqn] = encode_object(value.value, fqn=value.fqn)
            except UnsupportedStateError:
                # The planner may have a way of its own; then it is not compared.
                if not stores_objects_itself(planner):
                    raise
    return digest_replicas(values, objects, strict=strict)


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
