"""Which tensors of the merged table are stored under another name, on all ranks alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dcp_engine.planning.arrays import all_rows
from dcp_engine.planning.columns import I32, NO_ALIAS, UNDECIDED_ALIAS, TensorTable

__all__ = ["merge_aliases"]


def merge_aliases(tensors: TensorTable, rows: Sequence[I32], aliases: Sequence[I32]) -> I32:
    """(K,) row under which each tensor's data is stored, or ``NO_ALIAS``.

    An alias holds if every rank that can tell agrees on it, and kind, dtype and shape are those
    of its target; otherwise the tensor is stored on its own. Chains end at the tensor that is
    stored.

    Args:
        tensors: the merged table.
        rows: per rank, merged row of each of its tensors.
        aliases: per rank, its ``LocalPlan.aliases``.
    """
    count = len(tensors.names)
    target = np.full(count, NO_ALIAS, dtype=np.int32)
    known = np.zeros(count, dtype=np.bool_)
    disputed = np.zeros(count, dtype=np.bool_)
    seen: set[tuple[int, int]] = set()
    for own_rows, own_aliases in zip(rows, aliases, strict=True):
        # Ranks of one group share their arrays; what they say counts once.
        identity = (id(own_rows), id(own_aliases))
        if identity in seen:
            continue
        seen.add(identity)
        decided = own_aliases != UNDECIDED_ALIAS
        at = own_rows[decided]
        said = own_aliases[decided]
        shared = said >= 0
        said = said.copy()
        said[shared] = own_rows[said[shared]]
        new = ~known[at]
        target[at[new]] = said[new]
        known[at] = True
        disputed[at[target[at] != said]] = True
    target[disputed] = NO_ALIAS
    _keep_equal(tensors, target)
    return _end_of_chains(target)


def _keep_equal(tensors: TensorTable, target: I32) -> None:
    at = np.flatnonzero(target >= 0)
    to = target[at]
    equal = all_rows(tensors.shapes[at] == tensors.shapes[to])
    for column in (tensors.kinds, tensors.dtypes, tensors.ndims, tensors.owners):
        equal &= column[at] == column[to]
    target[at[~equal]] = NO_ALIAS


def _end_of_chains(target: I32) -> I32:
    """Follow aliases of aliases by doubling the stride; what goes in circles is stored itself."""
    end = np.where(target >= 0, target, np.arange(len(target), dtype=np.int32))
    for _ in range(max(1, len(target)).bit_length()):
        end = end[end]
    circular = target[end] >= 0
    own = np.arange(len(target), dtype=np.int32)
    return np.where(circular | (end == own), NO_ALIAS, end).astype(np.int32)
