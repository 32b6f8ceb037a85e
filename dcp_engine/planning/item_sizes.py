"""Bytes per element for a column of dtype codes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dcp_engine.format.dtypes import info

__all__ = ["item_sizes"]


def item_sizes(dtypes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """(K,) codes of ``format.dtypes`` -> (K,) bytes per element.

    Raises ``DamagedCheckpointError`` for a code that this torch does not have.
    """
    codes, rows = np.unique(dtypes, return_inverse=True)
    sizes = np.array([info(code).itemsize for code in codes.tolist()], dtype=np.int64)
    return sizes.take(rows) if len(codes) else np.zeros(0, dtype=np.int64)
