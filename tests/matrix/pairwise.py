"""Pairwise samples: small sets of cells in which all pairs of values occur that can occur.

Written by hand: the usual generators build cells from columns of values and a predicate, and here
the cells are a list already, most combinations of values being impossible.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

__all__ = ["pairs_of", "pairwise"]

Cell = TypeVar("Cell")
Pair = tuple[tuple[str, Hashable], tuple[str, Hashable]]


def pairs_of(properties: Mapping[str, object]) -> set[Pair]:
    """All pairs of values of one cell."""
    return set(combinations(sorted(properties.items(), key=lambda item: item[0]), 2))  # type: ignore[arg-type]


def pairwise(
    cells: Sequence[Cell], properties: Callable[[Cell], Mapping[str, object]]
) -> list[Cell]:
    """Few of ``cells`` that hold every pair of values that any of them holds.

    Greedy, and the same for the same input: of the cells that hold the rarest pair that is left,
    the one that holds most of what is left, the first of several.
    """
    held = [pairs_of(properties(cell)) for cell in cells]
    holders: dict[Pair, list[int]] = {}
    for index, pairs in enumerate(held):
        for pair in sorted(pairs, key=repr):
            holders.setdefault(pair, []).append(index)
    left = dict.fromkeys(sorted(holders, key=lambda pair: (len(holders[pair]), repr(pair))))
    chosen: list[int] = []
    while left:
        rarest = next(iter(left))
        best = max(holders[rarest], key=lambda index: (sum(p in left for p in held[index]), -index))
        chosen.append(best)
        for pair in held[best]:
            left.pop(pair, None)
    return [cells[index] for index in sorted(chosen)]
