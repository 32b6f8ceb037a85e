"""Do the ranks hold the same values under their replicated keys?

Every rank sends 32 bytes; tables of digests travel only if those leave a doubt. Belongs here:
the comparison. Does not belong here: digesting values, and what to do about a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xxhash

from dcp_engine.planning.divergence import format_ranks

__all__ = ["Comparison", "compare_details", "needs_details", "summarise"]

_HALF = 16
_SHOWN_KEYS = 8

RankGroups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Keys whose values differ, and which ranks agree with each other."""

    differing: Mapping[str, RankGroups]
    """By name, the groups of ranks that hold one value: the largest group first."""

    def describe(self) -> str:
        """One line: the first eight keys and their ranks; empty if nothing differs."""
        told = [
            f"{name!r} ({' against '.join(format_ranks(group) for group in groups)})"
            for name, groups in list(self.differing.items())[:_SHOWN_KEYS]
        ]
        more = len(self.differing) - len(told)
        return ", ".join(told) + (f" and {more} more" if more else "")


def summarise(compared: Mapping[str, int]) -> bytes:
    """32 bytes for a rank's table of 64-bit digests: which keys, and which values."""
    keys, values = xxhash.xxh3_128(), xxhash.xxh3_128()
    for name in sorted(compared):
        encoded = name.encode("utf-8", "surrogatepass")
        keys.update(len(encoded).to_bytes(8, "little") + encoded)
        values.update(compared[name].to_bytes(8, "little"))
    return keys.digest() + values.digest()


def needs_details(summaries: Sequence[bytes]) -> bool:
    """Whether some ranks may hold different values: same keys and other values, or other keys
    (which may overlap). Ranks that compare nothing agree with everybody."""
    nothing = summarise({})[:_HALF]
    return len({summary for summary in summaries if summary[:_HALF] != nothing}) > 1


def compare_details(tables: Sequence[Mapping[str, int]]) -> Comparison:
    """Compare the ranks' tables (in rank order) key by key. A key that only one rank has, or on
    which all that have it agree, does not differ."""
    ranks_of: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for rank, table in enumerate(tables):
        ranks_of.setdefault(tuple(table.items()), []).append(rank)
    holders: dict[str, dict[int, list[int]]] = {}
    for items, ranks in ranks_of.items():
        for name, digest in items:
            holders.setdefault(name, {}).setdefault(digest, []).extend(ranks)
    return Comparison(
        differing={
            name: tuple(
                sorted(
                    (tuple(sorted(ranks)) for ranks in by_digest.values()),
                    key=lambda group: (-len(group), group),
                )
            )
            for name, by_digest in holders.items()
            if len(by_digest) > 1
        }
    )
