"""A load in DCP's life cycle: for a planner or a reader that is not the engine's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.default_planner import (
    DefaultLoadPlanner,
    adopt_replaced_tensors,
    described_values,
)
from dcp_engine.error_context import located
from dcp_engine.errors import ConflictError, InvalidPlanError
from dcp_engine.foreign_calls import ObjectMail, takes_keywords
from dcp_engine.loader.destination import Destination
from dcp_engine.loader.report import LoadReport
from dcp_engine.loader.restore import closing, partly_filled, run_restore
from dcp_engine.metadata import Metadata
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.plan import LoadPlan
from dcp_engine.planner import LoadPlanner
from dcp_engine.storage import StorageReader

__all__ = ["load_items"]


def load_items(
    operation: Operation,
    destination: Destination,
    *,
    checkpoint_id: str | None,
    checkpoint: str,
    reader: StorageReader,
    planner: LoadPlanner,
) -> LoadReport:
    """Carry one attempt at a load through on this rank."""
    mail = ObjectMail(operation.world_size)
    before: dict[str, object] = {}
    reports: list[LoadReport] = []
    alone: list[LoadPlan] = []
    """The plan of a rank that knows its own part of the checkpoint only."""

    def here(action: Callable[[], bytes]) -> Callable[[], bytes]:
        def local() -> bytes:
            with located(checkpoint=checkpoint, rank=operation.rank):
                return action()

        return local

    def local_plan() -> bytes:
        destination.resolve()
        reader.reset(checkpoint_id)
        metadata, rank_local = _read_metadata(reader, operation.rank)
        # By position, as torch's DCP calls it.
        planner.set_up_planner(destination.resolved, metadata, operation.is_coordinator)
        _set_up_reader(reader, metadata, operation, use_collectives=not rank_local)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        if isinstance(planner, DefaultLoadPlanner):
            before.update(planner.state_dict)
            wanted = dict.fromkeys(value.fqn for value in described_values(planner))
        else:
            wanted = dict.fromkeys(item.dest_index.fqn for item in plan.items)
        reports.append(_report(metadata, wanted))
        # A reader of another origin may make up an id on every rank, as torch's does.
        save_id = reports[0].save_id if isinstance(reader, ColumnarReader) else None
        if rank_local:
            alone.extend(reader.prepare_global_plan(planner.create_global_plan([plan])))
        return mail.send((destination.has_stateful, save_id, None if rank_local else plan))

    def global_plan(messages: list[bytes]) -> Decision:
        with located(checkpoint=checkpoint, rank=operation.rank):
            offers: list[tuple[bool, str | None, LoadPlan | None]]
            offers = [mail.open(message) for message in messages]
            _refuse_different_checkpoints([save_id for _, save_id, _ in offers])
            stateful = b"1" if any(flag for flag, _, _ in offers) else b""
            local_plans = [plan for _, _, plan in offers if plan is not None]
            if not local_plans:
                return Decision(common=stateful)
            if len(local_plans) != len(offers):
                raise InvalidPlanError(
                    "some ranks read metadata of the whole checkpoint, and others only their own",
                    checkpoint=checkpoint,
                )
            plans = reader.prepare_global_plan(planner.create_global_plan(local_plans))
            if len(plans) != operation.world_size:
                raise InvalidPlanError(
                    f"{type(planner).__name__} and {type(reader).__name__} made {len(plans)} "
                    f"plans for {operation.world_size} ranks",
                    checkpoint=checkpoint,
                )
            return Decision(common=stateful, per_rank=[mail.send(plan) for plan in plans])

    def read(own: bytes) -> bytes:
        plan = planner.finish_plan(alone[0] if alone else mail.open(own))
        operation.check()
        reader.read_data(plan, planner).wait()
        return b""

    def restore() -> bytes:
        if isinstance(planner, DefaultLoadPlanner):
            adopt_replaced_tensors(planner, before)
        destination.adopt_resolved()
        destination.finish()
        return b""

    with closing(reader) if isinstance(reader, ColumnarReader) else nullcontext():
        stateful, own = operation.step("plan", here(local_plan), global_plan)
        with partly_filled():
            operation.step("read", here(partial(read, own)), lambda _: Decision())
    run_restore(operation, here(restore), together=bool(stateful))
    return reports[0]


def _refuse_different_checkpoints(save_ids: Sequence[str | None]) -> None:
    """Every rank has read the manifest by itself; another save may have come in between."""
    for rank, save_id in enumerate(save_ids):
        if save_id != save_ids[0]:
            raise ConflictError(
                f"rank 0 reads checkpoint {save_ids[0]}, and rank {rank} reads {save_id}",
                kind="superseded",
                hint="load again, when nobody saves to this place",
            )


def _report(metadata: Metadata, wanted: Mapping[str, object]) -> LoadReport:
    stored = metadata.state_dict_metadata
    # By attribute: a reader of another origin may hand out torch's own metadata, old ones too.
    meta = getattr(metadata, "storage_meta", None)
    return LoadReport(
        save_id=getattr(meta, "load_id", None),
        missing=tuple(name for name in wanted if name not in stored),
        unexpected=tuple(name for name in stored if name not in wanted),
    )


def _read_metadata(reader: StorageReader, rank: int) -> tuple[Metadata, bool]:
    """The metadata, and whether it is this rank's own.

    As in torch's DCP: a reader of another origin that finds none for the whole checkpoint, and
    takes keywords, is asked for what its rank stored by itself without collectives.
    """
    try:
        return reader.read_metadata(), False
    except Exception as error:
        if isinstance(reader, ColumnarReader) or not takes_keywords(reader.read_metadata):
            raise
        try:
            return reader.read_metadata(rank=rank), True
        except Exception as second:
            error.add_note(f"and for rank {rank} alone: {type(second).__name__}: {second}")
            raise error from second


def _set_up_reader(
    reader: StorageReader, metadata: Metadata, operation: Operation, *, use_collectives: bool
) -> None:
    keywords: dict[str, Any] = {}
    if takes_keywords(reader.set_up_storage_reader):
        keywords = {"rank": operation.rank, "use_collectives": use_collectives}
        if isinstance(reader, ColumnarReader):
            keywords["world_size"] = operation.world_size
    reader.set_up_storage_reader(metadata, operation.is_coordinator, **keywords)
