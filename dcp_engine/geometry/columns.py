"""The column types that this package's functions take and return.

A set of C boxes in D dimensions is two ``(C, D)`` arrays of 64-bit integers, ``offsets`` and
``sizes``, in elements; tensors of fewer dimensions are padded with offset 0 and size 1. Belongs
here: aliases and the little arithmetic on keys that all of geometry needs. Does not belong here:
anything that knows what a box is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["I32", "I64", "Bool", "group_rows", "order_rows"]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

_KEY_LIMIT = 1 << 62


def group_rows(columns: list[I64]) -> tuple[I64, int]:
    """Number equal rows alike.

    Args:
        columns: at least one ``(N,)`` array; row ``i`` is ``columns[0][i], columns[1][i], ...``.
    Returns:
        ``(group, n)``: ``group[i]`` in ``range(n)``, ordered as the rows sort lexicographically.
    """
    key = np.zeros(len(columns[0]), np.int64)
    span = 1
    for column in columns:
        if len(column) == 0:
            continue
        low = int(column.min())
        width = int(column.max()) - low + 1
        if span * width >= _KEY_LIMIT:
            # The combined key would not fit: number what there is so far densely, then go on.
            key, span = _dense(key)
            if span * width >= _KEY_LIMIT:
                column, width = _dense(column)
                low = 0
        key = key * width + (column - low)
        span *= width
    return _dense(key)


def order_rows(columns: list[I64]) -> I64:
    """The permutation that sorts rows lexicographically, stable, first column first."""
    return np.lexsort(columns[::-1]).astype(np.int64, copy=False)


def _dense(key: I64) -> tuple[I64, int]:
    values, inverse = np.unique(key, return_inverse=True)
    return inverse.astype(np.int64, copy=False).reshape(-1), len(values)
