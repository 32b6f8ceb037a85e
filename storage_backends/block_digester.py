"""Digests of a chunk's blocks from bytes that come in pieces of any size.

Belongs here: carrying a half-filled block over. The digest itself is ``dcp_engine.format.digest``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from dcp_engine.format.digest import block_digests, digest_value

__all__ = ["BlockDigester", "digests_around"]

U64 = npt.NDArray[np.uint64]


class BlockDigester:
    """Fills ``out`` with the digests of the blocks of what ``update`` is given.

    Args:
        out: (n,) one entry per block.
        block_size: bytes per block; the last one may be short.
    """

    def __init__(self, out: U64, block_size: int) -> None:
        self._out = out
        self._block_size = block_size
        self._done = 0
        self._partial = xxhash.xxh3_64()
        self._filled = 0

    def update(self, view: memoryview) -> None:
        """Take the next bytes (format ``B``)."""
        position = 0
        nbytes = view.nbytes
        if self._filled:
            position = min(nbytes, self._block_size - self._filled)
            self._partial.update(view[:position])
            self._filled += position
            if self._filled == self._block_size:
                self._end_partial()
        whole = (nbytes - position) // self._block_size
        if whole == 1:
            self._out[self._done] = digest_value(view[position : position + self._block_size])
        elif whole:
            self._out[self._done : self._done + whole] = block_digests(
                view[position : position + whole * self._block_size], self._block_size
            )
        self._done += whole
        position += whole * self._block_size
        if position < nbytes:
            self._partial.update(view[position:])
            self._filled += nbytes - position

    def finish(self) -> None:
        """Close the last block. Raises ``ValueError`` unless ``out`` is full."""
        if self._filled:
            self._end_partial()
        if self._done != len(self._out):
            raise ValueError(f"{self._done} blocks came where {len(self._out)} were expected")

    def _end_partial(self) -> None:
        self._out[self._done] = self._partial.intdigest()
        self._done += 1
        self._partial.reset()
        self._filled = 0


def digests_around(
    before: memoryview, view: memoryview, behind: memoryview, block_size: int
) -> list[int]:
    """The digests of the blocks of three stretches that follow each other; the outer two, each
    shorter than a block, may be empty."""
    made: list[int] = []
    at = 0
    nbytes = view.nbytes
    if before:
        at = min(block_size - before.nbytes, nbytes)
        first = xxhash.xxh3_64(before)
        first.update(view[:at])
        if at == nbytes and before.nbytes + at < block_size:
            first.update(behind)
            return [first.intdigest()]
        made.append(first.intdigest())
    stop = nbytes - (nbytes - at) % block_size
    made += [
        digest_value(view[begin : begin + block_size]) for begin in range(at, stop, block_size)
    ]
    if stop < nbytes or behind:
        last = xxhash.xxh3_64(view[stop:])
        last.update(behind)
        made.append(last.intdigest())
    return made
