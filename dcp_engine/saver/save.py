"""Which way a save goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcp_engine.coordination.failures import raised_by_exit
from dcp_engine.coordination.interface import Operation, RunIdentity, Session
from dcp_engine.default_planner import DefaultSavePlanner, is_default_save_planner
from dcp_engine.errors import UsageError
from dcp_engine.format.manifest import Manifest
from dcp_engine.format.metadata_view import ManifestMetadata
from dcp_engine.metadata import Metadata
from dcp_engine.native_storage import ColumnarWriter, CommitRecord, SaveTicket
from dcp_engine.planner import SavePlanner
from dcp_engine.redaction import redact_url
from dcp_engine.registry import Unavailable
from dcp_engine.saver.collective_free import save_collective_free
from dcp_engine.saver.columnar import save_columns
from dcp_engine.saver.item_based import save_items
from dcp_engine.saver.options import ExtraContent, SaveOptions
from dcp_engine.saver.plan_memory import PlanMemory
from dcp_engine.saver.prepare import PrepareState, prepare
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.storage import StorageWriter

__all__ = [
    "ColumnContent",
    "ItemContent",
    "Saved",
    "begin_save",
    "carry_out",
    "checkpoint_name",
    "content_of",
    "extra_contents",
    "require_planner",
    "require_writer",
    "save",
    "takes_columns",
]


@dataclass(frozen=True, kw_only=True)
class ColumnContent:
    """What a save as columns writes."""

    prepare: PrepareState
    dedup_to_lowest_rank: bool
    strict_replicas: bool


@dataclass(frozen=True, kw_only=True)
class ItemContent:
    """What a save in DCP's life cycle writes."""

    state_dict: Mapping[str, Any]
    planner: SavePlanner


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A save that was committed."""

    metadata: Metadata
    record: CommitRecord | None
    """Of a save as columns: what any process can read the manifest by."""


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
    # Inside the operation: its number is taken on every rank, and a failure is heard of.
    with begin_save(
        session, checkpoint_id=checkpoint_id, writer=writer, options=options
    ) as operation:
        require_writer(writer)
        content = content_of(
            state_dict, writer=writer, planner=planner, group=group, options=options
        )
        return carry_out(
            operation,
            content,
            checkpoint_id=checkpoint_id,
            writer=writer,
            identity=session.identity,
            rank=group.rank,
            world_size=world_size,
            memory=memory,
            options=options,
        ).metadata


def require_writer(writer: StorageWriter) -> None:
    """Raise ``UsageError`` for what is no writer: torch's class of that name, for example; for one
    that could not be had, why."""
    if isinstance(writer, Unavailable):
        raise writer.error
    if not isinstance(writer, StorageWriter):
        raise UsageError(
            f"{type(writer).__name__} is not a dcp_engine.StorageWriter",
            hint="derive it from dcp_engine.StorageWriter instead of torch's class of that name",
        )


def require_planner(planner: SavePlanner | None) -> None:
    """Raise ``UsageError`` for what is no planner: one of torch's classes, for example, whose items
    and checks are made for torch's metadata."""
    if planner is not None and not isinstance(planner, SavePlanner):
        raise UsageError(
            f"{type(planner).__name__} is not a dcp_engine.SavePlanner",
            hint="derive it from dcp_engine.DefaultSavePlanner instead of torch's class of that "
            "name",
        )


def takes_columns(writer: StorageWriter, planner: SavePlanner | None) -> bool:
    """Whether a save goes as columns: default planner, engine's own writer, neither with a method
    overridden."""
    return (
        isinstance(writer, ColumnarWriter)
        and writer.takes_columns
        and (planner is None or is_default_save_planner(planner))
    )


def content_of(
    state_dict: Mapping[str, Any],
    *,
    writer: StorageWriter,
    planner: SavePlanner | None,
    group: GroupRanks,
    options: SaveOptions,
) -> ColumnContent | ItemContent:
    """How ``state_dict`` is going to be saved; nothing is looked at yet.

    Raises ``UsageError`` as ``require_planner`` does.
    """
    require_planner(planner)
    planner = planner if planner is not None else DefaultSavePlanner()
    if not (isinstance(planner, DefaultSavePlanner) and takes_columns(writer, planner)):
        return ItemContent(state_dict=state_dict, planner=planner)
    chosen = planner
    strict = options.use_collectives and (options.strict_replicas or planner.strict_replicas)
    return ColumnContent(
        prepare=lambda: prepare(
            state_dict,
            planner=chosen,
            group=group,
            strict_replicas=strict,
            own_share_only=not options.use_collectives,
            compare=options.use_collectives,
        ),
        dedup_to_lowest_rank=planner.dedup_save_to_lowest_rank,
        strict_replicas=strict,
    )


def begin_save(
    session: Session,
    *,
    checkpoint_id: str | None,
    writer: StorageWriter,
    options: SaveOptions,
    number: int | None = None,
) -> Operation:
    """Take the next number of ``session`` for a save, unless one was taken before."""
    return session.begin(
        "save",
        checkpoint_name(checkpoint_id, writer),
        deadlines=options.deadlines,
        coordinator_rank=options.coordinator_rank if options.use_collectives else 0,
        number=number,
    )


def carry_out(
    operation: Operation,
    content: ColumnContent | ItemContent,
    *,
    checkpoint_id: str | None,
    writer: StorageWriter,
    identity: RunIdentity,
    rank: int,
    world_size: int,
    memory: PlanMemory,
    options: SaveOptions,
    announce: Callable[[str], None] | None = None,
    by_worker: bool = False,
    beside_training: bool = False,
    nice: int = 0,
) -> Saved:
    """Save ``content`` as this rank's part of ``operation``, which stays the caller's to close.

    Args:
        identity: of the process that writes.
        rank, world_size: among the ranks that save together, with or without collectives.
        announce: told the save id as soon as there is one.
        by_worker: this is not the process that asked for the save.
        beside_training: training goes on in this process meanwhile.
        nice: then, by how much threads that only write give way to others.
    """
    name = checkpoint_name(checkpoint_id, writer)
    ticket = _ticket_maker(
        identity,
        rank,
        world_size,
        options,
        announce,
        by_worker=by_worker,
        beside_training=beside_training,
        nice=nice,
    )
    if isinstance(content, ItemContent):
        _refuse_what_items_cannot(writer, content.planner, options, name)
        metadata = save_items(
            operation,
            content.state_dict,
            checkpoint_id=checkpoint_id,
            checkpoint=name,
            writer=writer,
            planner=content.planner,
            is_coordinator=rank == options.coordinator_rank,
            rank=rank,
            options=options,
            ticket=ticket,
        )
        return Saved(metadata=metadata, record=None)
    if not isinstance(writer, ColumnarWriter):
        raise UsageError(f"{type(writer).__name__} does not take columns", checkpoint=name)
    if options.use_collectives:
        record = save_columns(
            operation,
            content.prepare,
            checkpoint_id=checkpoint_id,
            writer=writer,
            dedup_to_lowest_rank=content.dedup_to_lowest_rank,
            strict_replicas=content.strict_replicas,
            memory=memory,
            ticket=ticket,
        )
    elif options.save_id is None:
        raise UsageError("a collective-free save needs a save_id", checkpoint=name)
    else:
        record = save_collective_free(
            operation,
            content.prepare,
            checkpoint_id=checkpoint_id,
            writer=writer,
            ticket=ticket(options.save_id),
        )
    return Saved(metadata=ManifestMetadata.lazily(_manifest_source(writer, record)), record=record)


def _manifest_source(writer: ColumnarWriter, record: CommitRecord) -> Callable[[], Manifest]:
    """The writer's. The save is committed: what fails here fails for whoever reads the metadata."""
    try:
        return writer.manifest_source(record)
    except BaseException as error:
        if raised_by_exit(error):
            raise
        reason = error

    def fail() -> Manifest:
        raise reason

    return fail


def checkpoint_name(checkpoint_id: str | None, writer: StorageWriter) -> str:
    """The checkpoint, for messages: without credentials."""
    if checkpoint_id is not None:
        return redact_url(checkpoint_id)
    if isinstance(writer, ColumnarWriter):
        # What fails here is to fail in the operation, where the other ranks hear of it.
        with suppress(Exception):
            return writer.checkpoint
    return type(writer).__name__


def _ticket_maker(
    identity: RunIdentity,
    rank: int,
    world_size: int,
    options: SaveOptions,
    announce: Callable[[str], None] | None,
    *,
    by_worker: bool,
    beside_training: bool,
    nice: int,
) -> Callable[[str], SaveTicket]:
    def ticket(save_id: str) -> SaveTicket:
        if announce is not None:
            announce(save_id)
        return SaveTicket(
            save_id=save_id,
            rank=rank,
            world_size=world_size,
            coordinator_rank=options.coordinator_rank,
            identity=identity,
            extra_files=extra_contents(options) if rank == options.coordinator_rank else {},
            user_metadata=dict(options.user_metadata),
            use_collectives=options.use_collectives,
            keep_replaced=options.keep_replaced,
            by_worker=by_worker,
            beside_training=beside_training,
            nice=nice if beside_training else 0,
        )

    return ticket


def extra_contents(options: SaveOptions) -> dict[str, bytes]:
    """The extra files' bytes, as they are now."""
    return {name: _content(name, content) for name, content in options.extra_files.items()}


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
