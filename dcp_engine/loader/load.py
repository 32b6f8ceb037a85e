"""Which way a load goes, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dcp_engine.coordination.interface import Session
from dcp_engine.default_planner import DefaultLoadPlanner, is_default_load_planner
from dcp_engine.errors import CheckpointException, UsageError
from dcp_engine.loader.columnar import load_columns
from dcp_engine.loader.destination import Destination
from dcp_engine.loader.item_based import load_items
from dcp_engine.loader.options import LoadOptions
from dcp_engine.loader.report import LoadReport
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.planner import LoadPlanner
from dcp_engine.redaction import redact_url
from dcp_engine.registry import Unavailable
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.storage import StorageReader

__all__ = ["ATTEMPTS", "load"]

ATTEMPTS = 3
"""How often all ranks start over together when the checkpoint is replaced under a load."""


def load(
    session: Session,
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | None,
    reader: StorageReader,
    planner: LoadPlanner | None,
    group: GroupRanks,
    options: LoadOptions,
) -> LoadReport:
    """Load into ``state_dict`` through ``reader``; on every rank of ``session``."""
    planner = planner if planner is not None else DefaultLoadPlanner()
    destination = Destination(state_dict)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            report = _attempt(session, destination, checkpoint_id, reader, planner, group, options)
            break
        except CheckpointException as error:
            # Every rank holds the same verdict, so all of them start over, or none.
            if error.kind != "superseded" or attempt == ATTEMPTS:
                raise
    return report


def _attempt(
    session: Session,
    destination: Destination,
    checkpoint_id: str | None,
    reader: StorageReader,
    planner: LoadPlanner,
    group: GroupRanks,
    options: LoadOptions,
) -> LoadReport:
    name = _name(checkpoint_id, reader)
    with session.begin(
        "load", name, deadlines=options.deadlines, coordinator_rank=options.coordinator_rank
    ) as operation:
        # Inside the operation: its number is taken on every rank, and a failure is heard of.
        if isinstance(reader, Unavailable):
            raise reader.error
        if not isinstance(reader, StorageReader):
            raise UsageError(
                f"{type(reader).__name__} is not a dcp_engine.StorageReader",
                hint="derive it from dcp_engine.StorageReader instead of torch's class of that "
                "name",
            )
        if not isinstance(planner, LoadPlanner):
            raise UsageError(
                f"{type(planner).__name__} is not a dcp_engine.LoadPlanner",
                hint="derive it from dcp_engine.DefaultLoadPlanner instead of torch's class of "
                "that name",
            )
        columnar = (
            isinstance(reader, ColumnarReader)
            and reader.takes_columns
            and is_default_load_planner(planner)
        )
        if isinstance(reader, ColumnarReader):
            reader.expect_ranks(operation.world_size)
        if columnar and isinstance(reader, ColumnarReader):
            if not isinstance(planner, DefaultLoadPlanner):
                raise UsageError(f"{type(planner).__name__} is not a DefaultLoadPlanner")
            return load_columns(
                session,
                operation,
                destination,
                checkpoint_id=checkpoint_id,
                reader=reader,
                planner=planner,
                group=group,
                options=options,
            )
        if options.per_rank != "error":
            raise UsageError(
                f"per_rank={options.per_rank!r} cannot be used with a planner or a reader of "
                f"another origin (here {type(planner).__name__} and {type(reader).__name__})",
                checkpoint=name,
                hint="use the default planner and one of dcp_engine's own readers",
            )
        with _pickles_allowed(planner, options.allow_pickle):
            return load_items(
                operation,
                destination,
                checkpoint_id=checkpoint_id,
                checkpoint=name,
                reader=reader,
                planner=planner,
            )


def _name(checkpoint_id: str | None, reader: StorageReader) -> str:
    """The checkpoint, for messages: without credentials."""
    if checkpoint_id is not None:
        return redact_url(checkpoint_id)
    if isinstance(reader, ColumnarReader):
        # What fails here is to fail in the operation, where the other ranks hear of it.
        with suppress(Exception):
            return reader.checkpoint
    return type(reader).__name__


@contextmanager
def _pickles_allowed(planner: LoadPlanner, allowed: bool) -> Iterator[None]:
    """The option of this load, for a planner that has it too; other planners decide themselves."""
    if not (allowed and isinstance(planner, DefaultLoadPlanner)):
        yield
        return
    before, planner.allow_pickle = planner.allow_pickle, True
    try:
        yield
    finally:
        planner.allow_pickle = before
