"""Which tensors of one rank share exactly the same memory (tied weights), to be written once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.state.values import TensorValue

__all__ = ["find_aliases"]

_NO_ALIAS = -1
_UNDECIDED = -2


def find_aliases(values: Sequence[TensorValue]) -> npt.NDArray[np.int32]:
    """Find the tensors that need not be written again.

    Returns:
        ``(len(values),)`` int32: the row of the first value with the same memory, dtype, strides,
        global shape, boxes, kind and layout; -1 (``planning.columns.NO_ALIAS``) where there is
        none; -2 (``UNDECIDED_ALIAS``) where this rank holds no elements and cannot tell. Partial
        overlaps are no aliases: each view is stored for itself.
    """
    first: dict[Hashable, int] = {}
    at = [value.tensors[0].data_ptr() if value.tensors else 0 for value in values]
    column = np.full(len(values), _NO_ALIAS, np.int32)
    # Nearly always: no two at one address, and nobody without memory.
    if len(set(at)) == len(at) and 0 not in at:
        return column
    times = Counter(at)
    for row, value in enumerate(values):
        if not value.boxes:
            column[row] = _UNDECIDED
            continue
        if times[at[row]] == 1:  # spare nearly all of them the comparison
            continue
        key = (
            value.kind,
            value.dtype,
            value.shape,
            value.boxes,
            value.layout,
            tuple(map(_memory, value.tensors)),
        )
        canonical = first.setdefault(key, row)
        if canonical != row:
            column[row] = canonical
    return column


def _memory(tensor: torch.Tensor) -> Hashable:
    # Strides of dimensions of size 1 say nothing.
    strides = (s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.device, tensor.data_ptr(), tuple(strides)
