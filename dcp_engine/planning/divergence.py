"""The error for ranks that disagree about what a name is, with every variant and its ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dcp_engine.errors import InvalidPlanError
from dcp_engine.format.dtypes import info
from dcp_engine.planning.columns import TensorTable
from dcp_engine.state.values import EntryKind

if TYPE_CHECKING:
    from dcp_engine.planning.merge import TableGroup

__all__ = ["check_tensor_or_object", "divergence", "format_ranks"]

_SHOWN_RANKS = 8


def divergence(
    name: str, groups: Iterable[TableGroup], object_ranks: Sequence[int] = ()
) -> InvalidPlanError:
    """Describe what each rank has under ``name``."""
    variants: dict[str, list[int]] = {}
    for group in groups:
        if name in group.table.names:
            text = _describe(group.table, group.table.names.index(name))
            variants.setdefault(text, []).extend(group.ranks)
    if object_ranks:
        variants["an object"] = list(object_ranks)
    told = "; ".join(f"{text} on {format_ranks(ranks)}" for text, ranks in variants.items())
    return InvalidPlanError(
        f"ranks disagree about {name!r}: {told}",
        kind="plan_divergence",
        tensor=name,
        hint="save one value everywhere, use different keys, or wrap rank-local values in PerRank",
    )


def check_tensor_or_object(
    groups: Sequence[TableGroup], objects: Sequence[tuple[str, ...]]
) -> None:
    """Refuse a name that is a tensor on one rank and an object on another."""
    holders: dict[str, list[int]] = {}
    by_names: dict[tuple[str, ...], list[int]] = {}
    for rank, names in enumerate(objects):
        by_names.setdefault(names, []).append(rank)
    for names, ranks in by_names.items():
        for name in names:
            holders.setdefault(name, []).extend(ranks)
    for group in groups:
        for name in holders.keys() & set(group.table.names):
            raise divergence(name, groups, sorted(holders[name]))


def format_ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, or ``ranks [0, 1, ...]``: the first eight and how many there are."""
    listed = sorted(set(ranks))
    if len(listed) == 1:
        return f"rank {listed[0]}"
    if len(listed) <= _SHOWN_RANKS:
        return f"ranks {listed}"
    shown = ", ".join(map(str, listed[:_SHOWN_RANKS]))
    return f"ranks [{shown}, ...] ({len(listed)} in all)"


def _describe(table: TensorTable, row: int) -> str:
    kind = EntryKind(int(table.kinds[row])).name.lower().replace("_", " ")
    shape = tuple(table.shapes[row, : int(table.ndims[row])].tolist())
    return f"{kind} {info(int(table.dtypes[row])).name} {list(shape)}"
