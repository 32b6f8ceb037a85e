"""In which round of an exchange each slab is read, so that no rank holds more than it may.

Belongs here: rounds, and what they take. Pure functions. Does not belong here: slabs and their
readers (``shared_slabs``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ALONE", "Pieces", "in_order", "within_limit"]

I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

ALONE = -1
"""The round of a slab that only its reader needs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """(P,) what ranks need of slabs."""

    slab: I64
    to: I64
    nbytes: I64


def in_order(reader: I64, nbytes: I64, alone: Bool, round_bytes: int) -> I64:
    """Rounds of some ``round_bytes``: a rank's slabs in order, by where they begin."""
    order = np.argsort(reader, kind="stable")
    ends = np.cumsum(nbytes[order])
    begins = ends - nbytes[order]
    first = np.flatnonzero(np.diff(reader[order], prepend=-1))
    own = np.repeat(begins[first], np.diff(np.append(first, len(reader))))
    rounds = np.empty(len(reader), np.int64)
    rounds[order] = (begins - own) // round_bytes
    return np.where(alone, ALONE, rounds)


def within_limit(
    rounds: I64, reader: I64, nbytes: I64, pieces: Pieces, *, world_size: int, limit: int
) -> I64 | None:
    """``rounds`` (S,), or such in which only some of the ranks read at a time: those for which no
    rank holds more than ``limit`` bytes. None: even one by one would be too much."""
    turns = 1
    while True:
        divided = np.where(rounds == ALONE, ALONE, rounds * turns + reader % turns)
        if _most_held(divided, reader, nbytes, pieces, world_size) <= limit:
            return divided
        if turns >= world_size:
            return None
        turns = min(2 * turns, world_size)


def _most_held(rounds: I64, reader: I64, nbytes: I64, pieces: Pieces, world_size: int) -> int:
    """The most bytes that a rank holds for a round: slabs, what is packed of them, and what
    comes."""
    shared = rounds != ALONE
    place = np.where(shared, rounds, 0) * world_size + reader
    places = (int(rounds.max(initial=0)) + 1) * world_size
    held = np.bincount(place[shared], nbytes[shared], places)
    away = (reader[pieces.slab] != pieces.to) & shared[pieces.slab]
    slab, to, size = pieces.slab[away], pieces.to[away], pieces.nbytes[away]
    arriving = np.bincount(rounds[slab] * world_size + to, size, places)
    if len(slab):
        lies = _as_it_lies(place, shared, nbytes, slab, to, size, world_size)
        held += np.bincount(place[slab], np.where(lies, 0, size), places)
    return int((held + arriving).max(initial=0))


def _as_it_lies(
    place: I64, shared: Bool, nbytes: I64, slab: I64, to: I64, size: I64, world_size: int
) -> Bool:
    """(P,) which pieces go out with a message that is all of the sender's slabs of that round,
    each once: it is sent from where they lie."""
    _, message = np.unique(place[slab] * world_size + to, return_inverse=True)
    slabs = np.bincount(place[shared])[place[slab]]
    count = np.bincount(message)[message]
    different = np.unique(message * len(place) + slab) // len(place)
    whole = np.bincount(message, size == nbytes[slab])[message]
    lies: Bool = (count == slabs) & (np.bincount(different)[message] == count) & (whole == count)
    return lies
