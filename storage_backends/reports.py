"""What the ranks report, compared with what was planned; and the manifest that follows from both.

Belongs here: pure functions. Does not belong here: looking at the medium, which the coordinator
never does for other ranks' files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from dcp_engine.errors import InvalidPlanError
from dcp_engine.format.manifest import (
    DataFile,
    DigestFile,
    ExtraFile,
    StoredObject,
    encode_manifest,
)
from dcp_engine.native_storage import FileReport, ObjectReport, RankReport, SaveTicket
from dcp_engine.planning.columns import NO_OWNER, GlobalPlan
from dcp_engine.state.values import EntryKind

__all__ = ["CheckedReports", "check_reports", "make_manifest"]


@dataclass(frozen=True, kw_only=True)
class CheckedReports:
    """What was written, as planned: the tables of the manifest."""

    data_files: tuple[DataFile, ...]
    """The planned files, in the plan's order, then those that hold objects only."""
    digest_files: tuple[DigestFile, ...]
    objects: tuple[StoredObject, ...]


def check_reports(
    plan: GlobalPlan, reports: Sequence[RankReport], ranks: Sequence[int]
) -> CheckedReports:
    """Compare what ``ranks`` report with ``plan``.

    Raises ``InvalidPlanError(kind="results_mismatch")``, naming the rank, unless every planned
    file, chunk and object was written, with the planned size, and nothing else was.
    """
    by_rank = {report.rank: report for report in reports}
    missing = [rank for rank in ranks if rank not in by_rank]
    if missing or len(reports) != len(ranks):
        _mismatch(
            f"{len(reports)} ranks report, expected are {len(ranks)}", min(missing, default=0)
        )
    files = {(r.rank, f.number): f for r in reports for f in r.files}
    objects = {(r.rank, o.name): o for r in reports for o in r.objects}
    if len(files) != sum(len(r.files) for r in reports):
        _mismatch("a file is reported twice", reports[0].rank)
    object_bytes = _object_bytes(objects)
    rows = _planned_rows(plan)
    data_files = [
        _data_file(rank, number, nbytes, files, object_bytes) for rank, number, nbytes in rows
    ]
    planned = {(rank, number) for rank, number, _ in rows}
    for rank, number in sorted(files.keys() - planned):
        if (rank, number) not in object_bytes:
            _mismatch(f"data file {number} was written and not planned", rank)
        data_files.append(_data_file(rank, number, 0, files, object_bytes))
    unplanned = object_bytes.keys() - files.keys()
    if unplanned:
        rank, number = min(unplanned)
        _mismatch(f"objects are reported in data file {number}, which is not", rank)
    _check_chunk_counts(plan, by_rank)
    row_of = {(f.rank, f.number): row for row, f in enumerate(data_files)}
    return CheckedReports(
        data_files=tuple(data_files),
        digest_files=tuple(_digest_file(by_rank[rank]) for rank in ranks if by_rank[rank].files),
        objects=_stored_objects(plan, objects, row_of),
    )


def _planned_rows(plan: GlobalPlan) -> list[tuple[int, int, int]]:
    columns = (plan.files.rank, plan.files.number, plan.files.data_bytes)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _object_bytes(objects: Mapping[tuple[int, str], ObjectReport]) -> dict[tuple[int, int], int]:
    """Bytes of objects per data file."""
    totals: dict[tuple[int, int], int] = {}
    for (rank, _), report in objects.items():
        if report.inline is None:
            key = (rank, report.number)
            totals[key] = totals.get(key, 0) + report.nbytes
    return totals


def _data_file(
    rank: int,
    number: int,
    tensor_bytes: int,
    files: Mapping[tuple[int, int], FileReport],
    object_bytes: Mapping[tuple[int, int], int],
) -> DataFile:
    report = files.get((rank, number))
    if report is None:
        _mismatch(f"data file {number} was planned and not written", rank)
    expected = report.data_start + tensor_bytes + object_bytes.get((rank, number), 0)
    if report.size != expected:
        _mismatch(f"data file {number} has {report.size} bytes, planned are {expected}", rank)
    return DataFile(rank=rank, number=number, data_start=report.data_start, size=report.size)


def _digest_file(report: RankReport) -> DigestFile:
    if not report.digests_size:
        _mismatch("data files were written without their digests", report.rank)
    return DigestFile(rank=report.rank, size=report.digests_size, xxh3_128=report.digests_xxh3)


def _check_chunk_counts(plan: GlobalPlan, by_rank: Mapping[int, RankReport]) -> None:
    planned = np.zeros(plan.world_size, np.int64)
    np.add.at(planned, plan.files.rank, plan.files.chunks)
    for rank, report in by_rank.items():
        if report.chunks != int(planned[rank]):
            _mismatch(f"{report.chunks} chunks were written, planned are {planned[rank]}", rank)


def _stored_objects(
    plan: GlobalPlan,
    objects: Mapping[tuple[int, str], ObjectReport],
    row_of: Mapping[tuple[int, int], int],
) -> tuple[StoredObject, ...]:
    table = plan.objects
    stored: list[StoredObject] = []
    for name, kind, writer in zip(
        table.names, table.kinds.tolist(), table.owners.tolist(), strict=True
    ):
        report = objects.get((writer, name))
        if report is None:
            _mismatch("an object was planned and not written", writer, name)
        owner = writer if kind == EntryKind.PER_RANK else NO_OWNER
        if report.inline is not None:
            stored.append(
                StoredObject(name=name, pickled=report.pickled, inline=report.inline, owner=owner)
            )
            continue
        stored.append(
            StoredObject(
                name=name,
                pickled=report.pickled,
                file=row_of[writer, report.number],
                start=report.start,
                nbytes=report.nbytes,
                owner=owner,
            )
        )
    if len(stored) != len(objects):
        planned = set(zip(table.owners.tolist(), table.names, strict=True))
        rank, name = min(objects.keys() - planned)
        _mismatch("an object was written and not planned", rank, name)
    return tuple(stored)


def make_manifest(
    plan: GlobalPlan,
    checked: CheckedReports,
    ticket: SaveTicket,
    *,
    time: float,
    writers: Mapping[str, str],
    block_size: int,
    extra_files: Sequence[ExtraFile],
) -> bytes:
    """The manifest's bytes; one rank's own where ``ticket`` says that the ranks do not talk."""
    return encode_manifest(
        save_id=ticket.save_id,
        world_size=ticket.world_size,
        time=time,
        writers=writers,
        user_metadata=ticket.user_metadata,
        block_size=block_size,
        data_files=checked.data_files,
        digest_files=checked.digest_files,
        extra_files=extra_files,
        tensors=plan.tensor_section,
        objects=checked.objects,
        nesting=plan.containers,
        token=None if ticket.use_collectives else ticket.save_id,
        rank=None if ticket.use_collectives else ticket.rank,
    )


def _mismatch(message: str, rank: int, tensor: str | None = None) -> NoReturn:
    raise InvalidPlanError(
        f"what was written is not what was planned: {message}",
        kind="results_mismatch",
        rank=rank,
        tensor=tensor,
        hint="nothing was committed; save again",
    )
