"""Which parts of a stored chunk to read for a wanted box, and in which of two ways.

Belongs here: pure arithmetic on boxes. Does not belong here: reading, digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dcp_engine.geometry.runs import Runs, box_runs

__all__ = ["BoxCutter", "Part"]


class Part(NamedTuple):
    """A box inside the wanted box that is read at one go."""

    begin: tuple[int, ...]
    """Offset inside the wanted box, in elements."""
    lengths: tuple[int, ...]
    first: int
    """First byte of the stored chunk that is needed."""
    end: int
    """The byte behind the last one."""
    direct: bool
    """One run in the chunk and one in the destination: it can be read where it belongs. Else it
    goes through scratch memory, and what lies between its runs is read in vain."""


@dataclass(frozen=True, kw_only=True)
class BoxCutter:
    """Cuts wanted boxes into parts.

    Args:
        max_span: bytes of scratch memory a part may need.
        max_gap: bytes between two runs that may be read in vain rather than skipped.
    """

    max_span: int
    max_gap: int

    def cut(
        self,
        chunk_sizes: Sequence[int],
        within: Sequence[int],
        lengths: Sequence[int],
        itemsize: int,
        destination_strides: Sequence[int] | None,
    ) -> Iterator[Part]:
        """The parts of box ``within, lengths`` of a chunk of ``chunk_sizes`` (elements, D each).

        ``destination_strides`` are those of the tensor that takes the box, in elements; None if
        its memory cannot be read into.
        """
        begin = (0,) * len(chunk_sizes)
        yield from self._cut(
            chunk_sizes, within, begin, tuple(lengths), itemsize, destination_strides
        )

    def _cut(
        self,
        chunk_sizes: Sequence[int],
        within: Sequence[int],
        begin: tuple[int, ...],
        lengths: tuple[int, ...],
        itemsize: int,
        strides: Sequence[int] | None,
    ) -> Iterator[Part]:
        offsets = [w + b for w, b in zip(within, begin, strict=True)]
        runs = box_runs(chunk_sizes, offsets, lengths, itemsize)
        first, end = runs.span
        if runs.count == 0:
            return
        if runs.count == 1 and strides is not None and _is_contiguous(lengths, strides):
            yield Part(begin, lengths, first, end, True)
            return
        gap = _largest_gap(runs)
        if end - first <= self.max_span and gap <= self.max_gap:
            yield Part(begin, lengths, first, end, False)
            return
        d = next(d for d, n in enumerate(lengths) if n > 1)
        step = 1
        if gap <= self.max_gap:
            # Dense, only too much at once: as many rows as fit.
            row = itemsize
            for extent in chunk_sizes[d + 1 :]:
                row *= extent
            step = max(1, self.max_span // row)
        for at in range(0, lengths[d], step):
            yield from self._cut(
                chunk_sizes,
                within,
                (*begin[:d], begin[d] + at, *begin[d + 1 :]),
                (*lengths[:d], min(step, lengths[d] - at), *lengths[d + 1 :]),
                itemsize,
                strides,
            )


def _largest_gap(runs: Runs) -> int:
    """Bytes between two steps of the slowest dimension: the gaps further in are never larger,
    because a box is at most as long as the array in every dimension."""
    if runs.count == 1:
        return 0
    inside = runs.length + sum(
        (n - 1) * s for n, s in zip(runs.counts[1:], runs.strides[1:], strict=True)
    )
    return runs.strides[0] - inside


def _is_contiguous(lengths: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a box of a tensor with ``strides`` (in elements) is one run of its memory."""
    expected = 1
    for length, stride in zip(reversed(lengths), reversed(strides), strict=True):
        if length != 1:
            if stride != expected:
                return False
            expected *= length
    return True
