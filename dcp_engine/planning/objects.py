"""Which rank writes each value that is not a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dcp_engine.errors import InvalidPlanError
from dcp_engine.planning.columns import ObjectTable
from dcp_engine.planning.divergence import format_ranks
from dcp_engine.state.values import EntryKind

__all__ = ["place_objects"]


def place_objects(
    tables: Sequence[ObjectTable], *, coordinator_rank: int, to_lowest_rank: bool
) -> ObjectTable:
    """One row per replicated name, one per name and rank for per-rank values, with its writer.

    A replicated object is written by the coordinator if it holds it (it is the one that needs
    the bytes, for the manifest), else by the lowest rank that does; with ``to_lowest_rank``
    always by that one.

    Raises ``InvalidPlanError(kind="plan_divergence")`` if ranks disagree about the kind.
    """
    holders: dict[str, list[int]] = {}
    kinds: dict[str, int] = {}
    distinct: dict[tuple[tuple[str, ...], bytes], list[int]] = {}
    for rank, table in enumerate(tables):
        distinct.setdefault((table.names, table.kinds.tobytes()), []).append(rank)
    for (names, kind_bytes), ranks in distinct.items():
        for name, kind in zip(names, kind_bytes, strict=True):
            if kinds.setdefault(name, kind) != kind:
                raise InvalidPlanError(
                    f"{name!r} is a per-rank object on some ranks and a replicated one on others "
                    f"({format_ranks(holders[name])} and {format_ranks(ranks)})",
                    kind="plan_divergence",
                    tensor=name,
                    hint="wrap the value in PerRank on all ranks or on none",
                )
            holders.setdefault(name, []).extend(ranks)
    names_out: list[str] = []
    owners: list[int] = []
    for name, ranks in holders.items():
        if kinds[name] == EntryKind.PER_RANK:
            names_out.extend([name] * len(ranks))
            owners.extend(sorted(ranks))
        else:
            names_out.append(name)
            at_coordinator = coordinator_rank in ranks and not to_lowest_rank
            owners.append(coordinator_rank if at_coordinator else min(ranks))
    return ObjectTable(
        names=tuple(names_out),
        kinds=np.array([kinds[name] for name in names_out], dtype=np.uint8),
        owners=np.array(owners, dtype=np.int32),
    )
