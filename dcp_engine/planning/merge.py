"""The ranks' tables as one: names, kinds, dtypes, shapes, aliases and objects.

Ranks with equal tables are handled as one group, so that the work per rank is a few array
operations, and the work per name is done once per distinct table. Belongs here: what the ranks
must agree on, and the error when they do not. Does not belong here: boxes (``unite``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from dcp_engine.planning.aliases import merge_aliases
from dcp_engine.planning.arrays import pad_columns, segment_positions
from dcp_engine.planning.columns import I32, I64, NO_OWNER, U8, LocalPlan, TensorTable
from dcp_engine.planning.divergence import check_tensor_or_object, divergence
from dcp_engine.state.values import EntryKind

__all__ = ["Merged", "TableGroup", "group_tables", "merge_tables"]


@dataclass(frozen=True, kw_only=True)
class TableGroup:
    """Ranks whose tensor tables are equal but for the owners of per-rank rows."""

    table: TensorTable
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    """The union of all ranks' tables."""

    tensors: TensorTable
    """In order of first appearance, rank by rank; a per-rank name has a row per rank."""
    rows: tuple[I32, ...]
    """Per rank: (K_r,) row of ``tensors`` for each row of the rank's own table."""
    aliases: I32
    """(K,)"""


def merge_tables(locals_: Sequence[LocalPlan]) -> Merged:
    """Merge the tables of all ranks.

    Raises ``InvalidPlanError(kind="plan_divergence")``, naming tensor and ranks, where ranks
    disagree about a kind, dtype or shape, or whether a name is a tensor.
    """
    groups = group_tables([plan.tensors for plan in locals_])
    check_tensor_or_object(groups, [plan.objects.names for plan in locals_])
    index: dict[str, int] = {}
    ids = [_numbers(group.table.names, index) for group in groups]
    common = _common_attributes(groups, ids, len(index))
    tensors, rows = _expand_owners(groups, ids, tuple(index), common, len(locals_))
    aliases = merge_aliases(tensors, rows, [plan.aliases for plan in locals_])
    return Merged(tensors=tensors, rows=rows, aliases=aliases)


def group_tables(tables: Sequence[TensorTable]) -> list[TableGroup]:
    """Ranks with equal tables, by their lowest rank. Tables that share their arrays, as decoded
    plans do, are recognised by that; others by a digest of their content."""
    digests: dict[tuple[int, ...], bytes] = {}
    groups: dict[bytes, list[int]] = {}
    for rank, table in enumerate(tables):
        identity = tuple(map(id, (table.names, table.kinds, table.dtypes, table.shapes)))
        digest = digests.get(identity)
        if digest is None:
            digest = digests[identity] = table_digest(table)
        groups.setdefault(digest, []).append(rank)
    return [TableGroup(table=tables[ranks[0]], ranks=tuple(ranks)) for ranks in groups.values()]


def table_digest(table: TensorTable) -> bytes:
    """16 bytes over everything but the owners."""
    state = xxhash.xxh3_128()
    state.update("\0".join(table.names).encode("utf-8", "surrogatepass"))
    lengths = np.fromiter(map(len, table.names), dtype=np.int64, count=len(table.names))
    for array in (lengths, table.kinds, table.dtypes, table.ndims, table.shapes):
        state.update(repr(array.shape).encode())
        state.update(np.ascontiguousarray(array).data)
    return state.digest()


def _numbers(names: Sequence[str], index: dict[str, int]) -> I64:
    """The number of each name; new names get the next ones."""
    for name in names:
        if name not in index:
            index[name] = len(index)
    return np.fromiter(map(index.__getitem__, names), dtype=np.int64, count=len(names))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Attributes:
    kinds: U8
    dtypes: U8
    ndims: U8
    shapes: I64


def _common_attributes(groups: Sequence[TableGroup], ids: Sequence[I64], count: int) -> _Attributes:
    """What each name is, after checking that all groups say the same. Per-rank values of one name
    may differ in dtype and shape."""
    width = max([1, *(group.table.shapes.shape[1] for group in groups)])
    kinds, dtypes, ndims = (np.zeros(count, dtype=np.uint8) for _ in range(3))
    shapes = np.ones((count, width), dtype=np.int64)
    known = np.zeros(count, dtype=np.bool_)
    for group, names in zip(groups, ids, strict=True):
        table = group.table
        own_shapes = pad_columns(table.shapes, width, 1)
        new = ~known[names]
        at = names[new]
        kinds[at], dtypes[at], ndims[at] = table.kinds[new], table.dtypes[new], table.ndims[new]
        shapes[at] = own_shapes[new]
        known[at] = True
        differs = (dtypes[names] != table.dtypes) | (ndims[names] != table.ndims)
        differs |= (shapes[names] != own_shapes).any(axis=1)
        differs &= table.kinds != EntryKind.PER_RANK
        differs |= kinds[names] != table.kinds
        if differs.any():
            raise divergence(table.names[int(np.argmax(differs))], groups)
    return _Attributes(kinds=kinds, dtypes=dtypes, ndims=ndims, shapes=shapes)


def _expand_owners(
    groups: Sequence[TableGroup],
    ids: Sequence[I64],
    names: tuple[str, ...],
    common: _Attributes,
    world_size: int,
) -> tuple[TensorTable, tuple[I32, ...]]:
    """One row per shared name, and one per name and rank where values are per rank."""
    owned = common.kinds == EntryKind.PER_RANK
    rows: list[I32] = [np.zeros(0, dtype=np.int32)] * world_size
    if not owned.any():
        for group, numbers in zip(groups, ids, strict=True):
            shared = numbers.astype(np.int32)
            for rank in group.ranks:
                rows[rank] = shared
        owners = np.full(len(names), NO_OWNER, dtype=np.int32)
        return _table(names, common, owners), tuple(rows)

    # Holders of each per-rank name, in rank order: their place decides their row.
    pairs_name: list[I64] = []
    pairs_rank: list[I64] = []
    pairs_group: list[I64] = []
    pairs_local: list[I64] = []
    for at, (group, numbers) in enumerate(zip(groups, ids, strict=True)):
        local = np.flatnonzero(owned[numbers])
        ranks = np.array(group.ranks, dtype=np.int64)
        pairs_name.append(np.tile(numbers[local], len(ranks)))
        pairs_rank.append(np.repeat(ranks, len(local)))
        pairs_group.append(np.full(len(local) * len(ranks), at, dtype=np.int64))
        pairs_local.append(np.tile(local, len(ranks)))
    name, holder = np.concatenate(pairs_name), np.concatenate(pairs_rank)
    group_of, local_row = np.concatenate(pairs_group), np.concatenate(pairs_local)
    counts = np.ones(len(names), dtype=np.int64)
    counts[owned] = np.bincount(name, minlength=len(names))[owned]
    base = np.cumsum(counts) - counts
    order = np.lexsort((holder, name))
    place = np.empty(len(name), dtype=np.int64)
    place[order] = segment_positions(counts[owned])
    row = base[name] + place

    repeat = np.repeat(np.arange(len(names)), counts)
    owners = np.full(len(repeat), NO_OWNER, dtype=np.int32)
    owners[row] = holder
    expanded = _Attributes(
        kinds=common.kinds[repeat],
        dtypes=common.dtypes[repeat],
        ndims=common.ndims[repeat],
        shapes=common.shapes[repeat],
    )
    width = common.shapes.shape[1]
    for at, (group, numbers) in enumerate(zip(groups, ids, strict=True)):
        table = group.table
        mine = group_of == at
        expanded.dtypes[row[mine]] = table.dtypes[local_row[mine]]
        expanded.ndims[row[mine]] = table.ndims[local_row[mine]]
        expanded.shapes[row[mine]] = pad_columns(table.shapes, width, 1)[local_row[mine]]
        per_rank = np.flatnonzero(owned[numbers])
        by_rank = row[mine].reshape(len(group.ranks), len(per_rank))
        for position, of_rank in enumerate(group.ranks):
            own = base[numbers]
            own[per_rank] = by_rank[position]
            rows[of_rank] = own.astype(np.int32)
    every = tuple(np.array(names, dtype=object).repeat(counts).tolist())
    return _table(every, expanded, owners), tuple(rows)


def _table(names: tuple[str, ...], attributes: _Attributes, owners: I32) -> TensorTable:
    return TensorTable(
        names=names,
        kinds=attributes.kinds,
        dtypes=attributes.dtypes,
        ndims=attributes.ndims,
        shapes=attributes.shapes,
        owners=owners,
    )
