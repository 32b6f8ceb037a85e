"""Which way a save goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcp_engine.coordination.interface import Session
from dcp_engine.default_planner import DefaultSavePlanner, is_default_save_planner
from dcp_engine.errors import UsageError
from dcp_engine.metadata import Metadata
from dcp_engine.native_storage import ColumnarWriter, SaveTicket
from dcp_engine.planner import SavePlanner
from dcp_engine.saver.collective_free import save_collective_free
from dcp_engine.saver.columnar import save_columns
from dcp_engine.saver.item_based import save_items
from dcp_engine.saver.options import ExtraContent, SaveOptions
from dcp_engine.saver.plan_memory import PlanMemory
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.storage import StorageWriter

__all__ = ["save"]


def save(
    session: Session,
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | None,
    writer: StorageWriter,
    planner: SavePlanner | None,
    group: GroupRanks,
    world_size: int,
    memory: PlanMemory,
    options: SaveOptions,
) -> Metadata:
    """Save ``state_dict`` through ``writer``.

    Args:
        session: of all ranks that save together; of this one alone when the save is
            collective-free.
        group, world_size: the ranks that save together, in either case.
        memory: plans of earlier saves, by the same ranks.
    """
    if not isinstance(writer, StorageWriter):
        raise UsageError(
            f"{type(writer).__name__} is not a dcp_engine.StorageWriter",
            hint="derive it from dcp_engine.StorageWriter instead of torch's class of that name",
        )
    planner = planner if planner is not None else DefaultSavePlanner()
    name = checkpoint_id
    if name is None:
        name = writer.checkpoint if isinstance(writer, ColumnarWriter) else type(writer).__name__
    coordinator = options.coordinator_rank if options.use_collectives else 0
    ticket = _ticket_maker(session, group.rank, world_size, options)
    with session.begin(
        "save", name, deadlines=options.deadlines, coordinator_rank=coordinator
    ) as operation:
        if (
            isinstance(writer, ColumnarWriter)
            and isinstance(planner, DefaultSavePlanner)
            and writer.takes_columns
            and is_default_save_planner(planner)
        ):
            if not options.use_collectives:
                if options.save_id is None:
                    raise UsageError("a collective-free save needs a save_id", checkpoint=name)
                return save_collective_free(
                    operation,
                    state_dict,
                    checkpoint_id=checkpoint_id,
                    writer=writer,
                    planner=planner,
                    group=group,
                    ticket=ticket(options.save_id),
                )
            return save_columns(
                operation,
                state_dict,
                checkpoint_id=checkpoint_id,
                writer=writer,
                planner=planner,
                group=group,
                options=options,
                memory=memory,
                ticket=ticket,
            )
        _refuse_what_items_cannot(writer, planner, options, name)
        return save_items(
            operation,
            state_dict,
            checkpoint_id=checkpoint_id,
            checkpoint=name,
            writer=writer,
            planner=planner,
            is_coordinator=group.rank == options.coordinator_rank,
            rank=group.rank,
            options=options,
            ticket=ticket,
        )


def _ticket_maker(
    session: Session, rank: int, world_size: int, options: SaveOptions
) -> Callable[[str], SaveTicket]:
    def ticket(save_id: str) -> SaveTicket:
        return SaveTicket(
            save_id=save_id,
            rank=rank,
            world_size=world_size,
            coordinator_rank=options.coordinator_rank,
            identity=session.identity,
            extra_files={n: _content(n, c) for n, c in options.extra_files.items()}
            if rank == options.coordinator_rank
            else {},
            user_metadata=options.user_metadata,
            use_collectives=options.use_collectives,
            keep_replaced=options.keep_replaced,
        )

    return ticket


def _content(name: str, value: ExtraContent) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    try:
        return Path(value).read_bytes()
    except (OSError, TypeError) as error:
        raise UsageError(
            f"the content of extra file {name!r} cannot be read: {error}",
            hint="give bytes, text, or the path of a file that the coordinator can read",
        ) from error


def _refuse_what_items_cannot(
    writer: StorageWriter, planner: SavePlanner, options: SaveOptions, name: str
) -> None:
    """DCP's life cycle has no place for these; dropping them silently would lose data."""
    given = []
    if options.strict_replicas and not isinstance(planner, DefaultSavePlanner):
        given.append("strict_replicas")
    if not isinstance(writer, ColumnarWriter):
        for keyword in ("extra_files", "user_metadata", "keep_replaced"):
            if getattr(options, keyword):
                given.append(keyword)
    if given:
        raise UsageError(
            f"{', '.join(given)} cannot be used with a planner or a writer of another origin "
            f"(here with {type(writer).__name__})",
            checkpoint=name,
            hint="use the default planner and one of dcp_engine's own writers",
        )
