"""Who writes what where: the coordinator's decision, from all ranks' local plans.

The steps, each a module: merge the tables, unite the boxes, check that they tile, share out what
several ranks hold, lay the pieces out in files. All of it works on arrays stacked over ranks; a
Python loop here runs over ranks, over tensors or over blocks of rows, never over two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dcp_engine.errors import UsageError
from dcp_engine.format.nesting import merge_nestings
from dcp_engine.planning.aliases import merge_aliases
from dcp_engine.planning.arrays import blocks, row_products
from dcp_engine.planning.balance import BalanceOptions, Pieces, share_out, with_whole
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
from dcp_engine.planning.layout import lay_out
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
        item_sizes(merged.tensors.dtypes),
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


def assignments(plan: GlobalPlan, local_plans: Sequence[LocalPlan]) -> Iterator[RankAssignment]:
    """Every rank's part of ``plan``, which was made from ``local_plans``: each when it is asked
    for, since all of them together are as large as the plan."""
    if len(local_plans) != plan.world_size:
        raise UsageError(f"{len(local_plans)} local plans for a plan of {plan.world_size} ranks")
    return map(_assigner(plan), range(plan.world_size), local_plans)


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
    pieces = share_out(boxes, item_sizes(table.dtypes), 1)
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
    return plan, _assigner(plan)(rank, local)


def _place(
    table: TensorTable, boxes: HeldBoxes, pieces: Pieces, rank: I32, files_per_rank: int
) -> tuple[PlacedChunks, PlannedFiles]:
    """``rank`` is (H,), who each holder of ``boxes`` is."""
    if files_per_rank < 1:
        raise UsageError(f"files_per_rank is {files_per_rank}, but a rank needs a file to write")
    count = len(boxes.tensor) - len(np.unique(pieces.box)) + len(pieces.box)
    source, writer = np.empty(count, np.int32), np.empty(count, np.int32)
    nbytes = np.empty(count, np.int64)
    tensor, offsets, sizes = boxes.tensor, boxes.offsets, boxes.sizes
    cut = count > len(tensor)  # else each box is one piece, and the columns are the same
    if cut:
        tensor = np.empty(count, np.int32)
        offsets, sizes = (np.empty((count, offsets.shape[1]), np.int64) for _ in range(2))
    element = item_sizes(table.dtypes)
    end = 0
    for block in blocks(len(boxes.tensor)):
        part = with_whole(boxes, pieces, block)
        here = slice(end, end + len(part.box))
        end = here.stop
        if cut:
            tensor[here] = boxes.tensor.take(part.box)
            offsets[here], sizes[here] = _piece_boxes(boxes, part)
        nbytes[here] = row_products(sizes[here]) * element.take(tensor[here])
        source[here], writer[here] = boxes.source.take(part.holder), rank.take(part.holder)
    places = lay_out(table, tensor, writer, nbytes, files_per_rank=files_per_rank)
    chunks = PlacedChunks(
        tensor=tensor,
        offsets=offsets,
        sizes=sizes,
        file=places.file,
        start=places.start,
        nbytes=nbytes,
        source=source,
        order=places.order,
    )
    return chunks, places.files


def _assigner(plan: GlobalPlan) -> Callable[[int, LocalPlan], RankAssignment]:
    """What gives a rank, whose local plan is given too, its part of ``plan``."""
    chunks, files = plan.chunks, plan.files
    if chunks.source is None or chunks.order is None:
        raise UsageError("this global plan was assigned before; make it anew from local plans")
    all_sources, order = chunks.source, chunks.order
    first_file = np.searchsorted(files.rank, np.arange(plan.world_size + 1))
    first_chunk = np.append(0, np.cumsum(files.chunks)).take(first_file)
    objects: dict[int, list[str]] = {}
    for name, owner in zip(plan.objects.names, plan.objects.owners.tolist(), strict=True):
        objects.setdefault(owner, []).append(name)

    def assign(rank: int, local: LocalPlan) -> RankAssignment:
        rows = order[first_chunk[rank] : first_chunk[rank + 1]]
        own_files = slice(int(first_file[rank]), int(first_file[rank + 1]))
        width = local.chunks.offsets.shape[1]
        source = all_sources.take(rows)
        offsets = chunks.offsets.take(rows, axis=0)[:, :width]
        return RankAssignment(
            source=source,
            within=offsets - local.chunks.offsets.take(source, axis=0),
            offsets=offsets,
            sizes=chunks.sizes.take(rows, axis=0)[:, :width],
            file=np.repeat(files.number[own_files], files.chunks[own_files]),
            start=chunks.start.take(rows),
            nbytes=chunks.nbytes.take(rows),
            file_data_bytes=files.data_bytes[own_files],
            objects=tuple(objects.get(rank, ())),
        )

    return assign


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
