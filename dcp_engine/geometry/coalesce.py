"""Byte runs merged into fewer, larger reads, with a bound on what is read in vain.

Pure functions on sorted columns of starts and lengths, in bytes. Does not belong here: reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dcp_engine.geometry.columns import I64

__all__ = ["Reads", "coalesce", "widen_to_blocks"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reads:
    """Merged reads, sorted and disjoint unless a size limit cut through overlapping runs."""

    start: I64
    """(M,) first byte."""
    nbytes: I64
    """(M,)"""
    first_run: I64
    """(M + 1,) read ``i`` serves runs ``first_run[i] : first_run[i + 1]``."""


def coalesce(starts: I64, lengths: I64, *, max_gap: int, max_size: int) -> Reads:
    """Merge runs that follow each other closely.

    Args:
        starts: ``(N,)`` first bytes, ascending.
        lengths: ``(N,)`` bytes, > 0. Runs may overlap.
        max_gap: largest hole between two runs that is read in vain, in bytes.
        max_size: largest merged read, in bytes; a single run that is longer stays as it is.
    """
    n = len(starts)
    if not n:
        nothing = np.empty(0, np.int64)
        return Reads(start=nothing, nbytes=nothing, first_run=np.zeros(1, np.int64))
    reach = np.maximum.accumulate(starts + lengths)
    holes = np.flatnonzero(starts[1:] - reach[:-1] > max_gap) + 1
    begins = np.concatenate(([0], holes)).astype(np.int64)
    ends = np.concatenate((holes, [n])).astype(np.int64)
    if bool((reach[ends - 1] - starts[begins] > max_size).any()):
        begins = _cut(starts, reach, begins, ends, max_size)
        ends = np.concatenate((begins[1:], [n])).astype(np.int64)
    # A run inside an earlier read's reach may end sooner than that; each read counts its own.
    farthest = np.maximum.reduceat(starts + lengths, begins)
    return Reads(
        start=starts[begins],
        nbytes=farthest - starts[begins],
        first_run=np.concatenate((begins, [n])).astype(np.int64),
    )


def _cut(starts: I64, reach: I64, begins: I64, ends: I64, max_size: int) -> I64:
    """Begin a new read wherever one would grow beyond ``max_size``: one search per read."""
    cuts: list[int] = []
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        at = begin
        while at < end:
            cuts.append(at)
            limit = starts[at] + max_size
            at += max(1, int(np.searchsorted(reach[at:end], limit, side="right")))
    return np.asarray(cuts, np.int64)


def widen_to_blocks(
    starts: I64, lengths: I64, *, chunk_nbytes: I64 | int, block_size: int
) -> tuple[I64, I64]:
    """Widen runs to the borders of the digest blocks they touch.

    Args:
        starts: ``(N,)`` first bytes, counted from the begin of the run's chunk.
        lengths: ``(N,)`` bytes.
        chunk_nbytes: ``(N,)`` or one number: size of the chunk; its last block may be short.
        block_size: bytes per block.
    Returns:
        New starts and lengths, counted likewise. Empty runs stay empty.
    """
    begin = starts // block_size * block_size
    end = np.minimum(-(-(starts + lengths) // block_size) * block_size, chunk_nbytes)
    empty = lengths == 0
    return np.where(empty, starts, begin), np.where(empty, 0, end - begin)
