"""Who writes what where: the coordinator's decision, from all ranks' local plans.

The steps, each a module: merge the tables, unite the boxes, check that they tile, share out what
several ranks hold, lay the pieces out in files. All of it works on arrays stacked over ranks; a
Python loop here runs over ranks or over tensors, never over both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dcp_engine.errors import UsageError
from dcp_engine.format.nesting import merge_nestings
from dcp_engine.planning.aliases import merge_aliases
from dcp_engine.planning.arrays import row_products
from dcp_engine.planning.balance import BalanceOptions, Pieces, share_out
from dcp_engine.planning.columns import (
    I32,
    I64,
    GlobalPlan,
    LocalPlan,
    ObjectTable,
    PlacedChunks,
    PlannedFiles,
    RankAssignment,
    TensorTable,
)
from dcp_engine.planning.item_sizes import item_sizes
from dcp_engine.planning.layout import file_order, lay_out
from dcp_engine.planning.merge import Merged, merge_tables
from dcp_engine.planning.objects import place_objects
from dcp_engine.planning.unite import HeldBoxes, unite_boxes
from dcp_engine.planning.validate import validate_tiling

__all__ = ["assignments", "make_global_plan", "make_own_plan"]


def make_global_plan(
    local_plans: Sequence[LocalPlan],
    *,
    coordinator_rank: int,
    dedup_to_lowest_rank: bool = False,
    files_per_rank: int = 1,
    balance: BalanceOptions | None = None,
) -> GlobalPlan:
    """Plan a save.

    Args:
        local_plans: every rank's local plan, in rank order.
        coordinator_rank: writes replicated objects, if it holds them.
        dedup_to_lowest_rank: what several ranks hold is written whole by the lowest of them,
            instead of being shared out by bytes.
        files_per_rank: at most so many data files a rank (more only where a header would
            become too long).
        balance: how finely replicated tensors are spread.

    Raises ``InvalidPlanError`` (``plan_divergence``, ``plan_overlap``, ``plan_gap``) naming the
    tensor and the ranks.
    """
    merged = merge_tables(local_plans)
    boxes = unite_boxes(local_plans, merged)
    validate_tiling(merged.tensors, merged.aliases, boxes)
    pieces = share_out(
        boxes,
        item_sizes(merged.tensors.dtypes).take(boxes.tensor),
        len(local_plans),
        to_lowest_rank=dedup_to_lowest_rank,
        options=balance,
    )
    chunks, files = _place(merged.tensors, boxes, pieces, boxes.rank, files_per_rank)
    return GlobalPlan(
        world_size=len(local_plans),
        tensors=merged.tensors,
        aliases=merged.aliases,
        chunks=chunks,
        files=files,
        objects=place_objects(
            [plan.objects for plan in local_plans],
            coordinator_rank=coordinator_rank,
            to_lowest_rank=dedup_to_lowest_rank,
        ),
        containers=merge_nestings([plan.containers for plan in local_plans]),
    )


def assignments(
    plan: GlobalPlan,
    local_plans: Sequence[LocalPlan],
) -> list[RankAssignment]:
    """Every rank's part of ``plan``, which was made from ``local_plans``."""
    if len(local_plans) != plan.world_size:
        raise UsageError(f"{len(local_plans)} local plans for a plan of {plan.world_size} ranks")
    return _assign(plan, dict(enumerate(local_plans)))


def make_own_plan(
    local: LocalPlan, *, rank: int, world_size: int, files_per_rank: int = 1
) -> tuple[GlobalPlan, RankAssignment]:
    """The plan of a rank that writes all it has, without a word with the others.

    What the ranks hold together is not checked: a load does that, when it has all manifests.
    Raises ``InvalidPlanError(kind="plan_overlap")`` for boxes that contradict their own tensor.
    """
    table, count = local.tensors, len(local.tensors.names)
    rows = np.arange(count, dtype=np.int32)
    merged = Merged(
        tensors=table, rows=(rows,), aliases=merge_aliases(table, [rows], [local.aliases])
    )
    boxes = unite_boxes([local], merged)
    pieces = share_out(boxes, item_sizes(table.dtypes).take(boxes.tensor), 1)
    owner = np.full(len(boxes.rank), rank, dtype=np.int32)
    chunks, files = _place(table, boxes, pieces, owner, files_per_rank)
    plan = GlobalPlan(
        world_size=world_size,
        tensors=table,
        aliases=merged.aliases,
        chunks=chunks,
        files=files,
        objects=ObjectTable(
            names=local.objects.names,
            kinds=local.objects.kinds,
            owners=np.full(len(local.objects.names), rank, dtype=np.int32),
        ),
        containers=local.containers,
    )
    return plan, _assign(plan, {rank: local})[0]


def _place(
    table: TensorTable, boxes: HeldBoxes, pieces: Pieces, rank: I32, files_per_rank: int
) -> tuple[PlacedChunks, PlannedFiles]:
    """``rank`` is (H,), who each holder of ``boxes`` is."""
    if files_per_rank < 1:
        raise UsageError(f"files_per_rank is {files_per_rank}, but a rank needs a file to write")
    offsets, sizes = _piece_boxes(boxes, pieces)
    tensor = boxes.tensor.take(pieces.box)
    element = item_sizes(table.dtypes).take(tensor)
    nbytes = row_products(sizes) * element
    places = lay_out(
        table,
        tensor,
        rank.take(pieces.holder),
        nbytes,
        element,
        files_per_rank=files_per_rank,
    )
    chunks = PlacedChunks(
        tensor=tensor,
        offsets=offsets,
        sizes=sizes,
        file=places.file,
        start=places.start,
        nbytes=nbytes,
        source=boxes.source.take(pieces.holder),
    )
    return chunks, places.files


def _assign(plan: GlobalPlan, locals_: Mapping[int, LocalPlan]) -> list[RankAssignment]:
    """The parts of the ranks in ``locals_``."""
    chunks, files = plan.chunks, plan.files
    if chunks.source is None:
        raise UsageError("this global plan was assigned before; make it anew from local plans")
    order = file_order(chunks.file, item_sizes(plan.tensors.dtypes).take(chunks.tensor))
    source, file = chunks.source.take(order), chunks.file.take(order)
    start, nbytes = chunks.start.take(order), chunks.nbytes.take(order)
    offsets, sizes = chunks.offsets.take(order, axis=0), chunks.sizes.take(order, axis=0)
    first_file = np.searchsorted(files.rank, np.arange(plan.world_size + 1))
    first_chunk = np.searchsorted(file, first_file)
    number = files.number.take(file)
    objects: dict[int, list[str]] = {rank: [] for rank in locals_}
    for name, owner in zip(plan.objects.names, plan.objects.owners.tolist(), strict=True):
        if owner in objects:
            objects[owner].append(name)
    result: list[RankAssignment] = []
    for rank, local in locals_.items():
        mine = slice(int(first_chunk[rank]), int(first_chunk[rank + 1]))
        width = local.chunks.offsets.shape[1]
        at = local.chunks.offsets.take(source[mine], axis=0)
        result.append(
            RankAssignment(
                source=source[mine],
                within=offsets[mine, :width] - at,
                offsets=offsets[mine, :width],
                sizes=sizes[mine, :width],
                file=number[mine],
                start=start[mine],
                nbytes=nbytes[mine],
                file_data_bytes=files.data_bytes[first_file[rank] : first_file[rank + 1]],
                objects=tuple(objects[rank]),
            )
        )
    return result


def _piece_boxes(boxes: HeldBoxes, pieces: Pieces) -> tuple[I64, I64]:
    """Offsets and sizes of the pieces: the box, cut in its first dimension longer than 1."""
    offsets = boxes.offsets.take(pieces.box, axis=0)
    sizes = boxes.sizes.take(pieces.box, axis=0)
    open_ = np.ones(len(offsets), dtype=np.bool_)
    for d in range(offsets.shape[1]):
        here = open_ & (sizes[:, d] > 1)
        offsets[:, d] += np.where(here, pieces.row, 0)
        sizes[:, d] = np.where(here, pieces.rows, sizes[:, d])
        open_ &= ~here
    return offsets, sizes
