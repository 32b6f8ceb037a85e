"""Whether boxes tile a tensor: pure arithmetic on untrusted numbers.

Belongs here: the check that a manifest's chunk table must pass before it is used.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import numpy.typing as npt

from dcp_engine.errors import DamagedCheckpointError

__all__ = ["check_tiling", "slabs_in_order"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]

_PRIME = np.uint64((1 << 31) - 1)
_ROUNDS = 3


def check_tiling(shape: tuple[int, ...], offsets: I64, sizes: I64, *, tensor: str) -> None:
    """Check that the boxes ``offsets, sizes`` (n, ndim), already known to lie inside ``shape``,
    cover each element exactly once.

    Raises ``DamagedCheckpointError``: ``chunks_overlap``, or ``manifest_invalid`` for a gap. A
    tensor without elements may have no box, or one over the whole.
    """
    count = len(offsets)
    total = math.prod(shape)
    if count == 1 and bool((sizes[0] == shape).all()):
        return
    if total == 0:
        if count:
            raise DamagedCheckpointError("a tensor without elements has chunks", tensor=tensor)
        return
    volumes = sizes.prod(axis=1)
    if (volumes == 0).any():
        raise DamagedCheckpointError("a chunk is empty", tensor=tensor)
    # Two halves, because a sum over hostile boxes can be more than 64 bits.
    covered = (int((volumes >> 32).sum()) << 32) + int((volumes & 0xFFFFFFFF).sum())
    if covered < total:
        raise DamagedCheckpointError(
            f"the chunks cover {covered} of {total} elements", tensor=tensor
        )
    if covered > total or not (
        bool(slabs_in_order(np.array([shape], np.int64), np.array([count]), offsets, sizes)[0])
        or _same_indicator(shape, offsets, sizes)
    ):
        raise DamagedCheckpointError("chunks overlap", kind="chunks_overlap", tensor=tensor)


def slabs_in_order(shapes: I64, counts: I64, offsets: I64, sizes: I64) -> Bool:
    """Whether the boxes of each of n tensors, as they are ordered, tile it by slabs of the first
    dimension, each of them tiled by slabs of the next, and so on: what a writer makes of any
    device mesh.

    Args:
        shapes: (n, D).
        counts: (n,) boxes of each tensor, at least one.
        offsets, sizes: (C, D) one tensor's boxes behind the other's, none of them empty.
    Returns:
        (n,) bool; false does not say that they do not tile it.

    Neighbours tell: where two share their place in a dimension, their extents there must be the
    same; where not, the second must begin where the first ends. Six times faster than the general
    check (60 us against 350 for a thousand boxes), which decides wherever this says no.
    """
    last = np.cumsum(counts) - 1
    first = last + 1 - counts
    of = np.repeat(np.arange(len(counts)), counts)
    neighbours = of[1:] == of[:-1]
    inside = neighbours.copy()  # both in one slab of the dimensions so far
    wrong = np.zeros(len(inside), np.bool_)
    good = np.ones(len(counts), np.bool_)
    for begin, size, extent in zip(offsets.T, sizes.T, shapes.T, strict=True):
        end = begin + size
        good &= (begin[first] == 0) & (end[last] == extent)
        same = begin[1:] == begin[:-1]
        continued = np.where(same, size[1:] == size[:-1], begin[1:] == end[:-1])
        turned = (begin[1:] == 0) & (end[:-1] == extent[of[:-1]])
        wrong |= ~np.where(inside, continued, turned)
        inside &= same
    wrong |= inside  # one box twice
    good[of[1:][wrong & neighbours]] = False
    return good


def _same_indicator(shape: tuple[int, ...], offsets: I64, sizes: I64) -> bool:
    """Whether the boxes' indicator functions add up to that of the whole tensor.

    That is so exactly if the formal sums of the boxes' signed corners agree: for each box the
    product over the dimensions of ``x[begin] - x[end]``. Both polynomials are compared at random
    points modulo a prime: boxes that tile always pass, others pass with a chance of less than
    (64 / 2**31) ** 3, whoever made them, since the points are drawn anew each time. Linear in
    the number of boxes, where a sweep would not be.
    """
    begins = offsets.astype(np.uint64)
    ends = (offsets + sizes).astype(np.uint64)
    whole_begin = np.zeros((1, len(shape)), np.uint64)
    whole_end = np.array([shape], np.uint64)
    for _ in range(_ROUNDS):
        keys = [secrets.randbits(64) for _ in shape]
        boxes = _corner_sum(begins, ends, keys)
        if boxes != _corner_sum(whole_begin, whole_end, keys):
            return False
    return True


def _corner_sum(begins: U64, ends: U64, keys: list[int]) -> int:
    product: U64 = np.ones(len(begins), np.uint64)
    for dimension, key in enumerate(keys):
        product *= _random_point(begins[:, dimension], key) + (
            _PRIME - _random_point(ends[:, dimension], key)
        )
        product %= _PRIME
    # Factors are below 2**32 and 2**31. Fewer than 2**33 terms below 2**31 each: no overflow.
    return int(product.sum(dtype=np.uint64) % _PRIME)


def _random_point(values: U64, key: int) -> U64:
    """A value below the prime for each coordinate, unpredictable without ``key`` (splitmix64)."""
    mixed: U64 = np.add(values, np.uint64(key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return np.remainder(mixed, _PRIME)
