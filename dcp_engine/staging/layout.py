"""Where the tensors of one rank lie in its arena: a pure function, and its result as columns.

Belongs here: offsets, sizes, shared memory found. Does not belong here: copying (``copier``).

Every tensor costs the bytes of its own elements, however large its storage is. Tensors with
exactly the same memory get the same place. Small tensors come first, close together, so that they
can be copied with few calls; large ones begin on a page.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from dcp_engine.errors import UsageError
from dcp_engine.format.dtypes import code_of, info
from dcp_engine.planning.columns import I64, U8
from dcp_engine.staging.arena import Arena

__all__ = ["SMALL", "ArenaLayout", "make_layout"]

SMALL = 16 << 10
"""Tensors of fewer bytes are copied many at a time."""
_ALIGNMENT = 64
_PAGE = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class ArenaLayout:
    """N tensors in an arena. Row ``i`` is the ``i``-th tensor; all lie there contiguously."""

    offsets: I64
    """(N,) bytes from the begin of the arena; 0 for a tensor without elements."""
    nbytes: I64
    """(N,)"""
    dtypes: U8
    """(N,) codes of ``format.dtypes``."""
    ndims: U8
    """(N,)"""
    shapes: I64
    """(sum of ndims,) all shapes, one behind the other."""
    distinct: I64
    """(M,) the rows that have memory of their own, by rising offset; the others have elements
    nowhere, or share another row's."""
    size: int
    """Bytes of the arena that are used."""

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def copied_bytes(self) -> int:
        """Bytes that are copied: the sizes of the distinct rows."""
        return int(self.nbytes[self.distinct].sum())

    def fingerprint(self) -> bytes:
        """16 bytes that are equal for equal layouts, in any process."""
        state = xxhash.xxh3_128()
        columns = (self.offsets, self.nbytes, self.dtypes, self.ndims, self.shapes, self.distinct)
        for column in columns:
            state.update(len(column).to_bytes(8, "little"))
            state.update(column.tobytes())
        return state.digest()

    def views(self, arena: Arena) -> list[torch.Tensor]:
        """The staged tensors: contiguous views into ``arena``, in any process that maps it."""
        whole = arena.view(0, self.size)  # refuses an arena that is too small
        if self.size:
            whole = arena.view(0, arena.size)
        typed = {code: whole.view(info(code).dtype) for code in np.unique(self.dtypes).tolist()}
        result = []
        at = 0
        shapes = self.shapes.tolist()
        for offset, code, ndim in zip(
            self.offsets.tolist(), self.dtypes.tolist(), self.ndims.tolist(), strict=True
        ):
            shape = shapes[at : at + ndim]
            at += ndim
            elements = typed[code]
            # One call; narrow, view as a dtype and view in a shape would be three.
            begin = offset // elements.element_size()
            result.append(elements.as_strided(shape, _contiguous(shape), begin))
        return result


def make_layout(tensors: Sequence[torch.Tensor]) -> ArenaLayout:
    """Find a place for every one of ``tensors`` (plain strided ones, on any device).

    Raises ``UnsupportedStateError`` for a dtype that cannot be stored, and ``UsageError`` for a
    conjugate or negative view: its memory is not its value (``plain_memory`` resolves it).
    """
    codes: dict[torch.dtype, int] = {}
    # Lists, of which columns are made at the end: numpy takes single numbers slowly.
    dtypes: list[int] = []
    ndims: list[int] = []
    sizes: list[int] = []
    shapes: list[int] = []
    first: dict[Hashable, int] = {}
    rows: list[int] = []
    for row, tensor in enumerate(tensors):
        dtype, shape = tensor.dtype, tensor.shape
        code = codes.get(dtype)
        if code is None:
            code = codes[dtype] = code_of(dtype)
        if (dtype.is_complex and tensor.is_conj()) or tensor.is_neg():
            raise UsageError("a conjugate or negative view was to be staged as it is")
        dtypes.append(code)
        ndims.append(len(shape))
        shapes += shape
        size = tensor.nbytes
        sizes.append(size)
        rows.append(first.setdefault(_memory(tensor, size), row) if size else row)
    nbytes, shared = np.array(sizes, np.int64), np.array(rows, np.int64)
    own = np.flatnonzero((nbytes > 0) & (shared == np.arange(len(tensors))))
    distinct = own[np.argsort(nbytes[own] >= SMALL, kind="stable")]
    alignment = np.where(nbytes[distinct] >= SMALL, _PAGE, _ALIGNMENT)
    offsets = np.zeros(len(tensors), np.int64)
    offsets[distinct], end = _placed(nbytes[distinct], alignment)
    return ArenaLayout(
        offsets=offsets[shared],
        nbytes=nbytes,
        dtypes=np.array(dtypes, np.uint8),
        ndims=np.array(ndims, np.uint8),
        shapes=np.array(shapes, np.int64),
        distinct=distinct,
        size=end,
    )


def _contiguous(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * max(shape[dim], 1)
    return strides


def _memory(tensor: torch.Tensor, nbytes: int) -> Hashable:
    """Equal for tensors that consist of the same bytes in the same order."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.device, nbytes
    strides = (s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    sizes = (n for n in tensor.shape if n > 1)
    return tensor.data_ptr(), tensor.device, tensor.element_size(), *strides, -1, *sizes


def _placed(nbytes: I64, alignment: I64) -> tuple[I64, int]:
    """Offsets one behind the other, each a multiple of its alignment, which never falls from row
    to row; and the end of the last."""
    if not len(nbytes):
        return np.zeros(0, np.int64), 0
    # Every size rounded up to its own alignment keeps what follows aligned; where the alignment
    # rises, what comes before is rounded up to the new one.
    room = -(-nbytes // alignment) * alignment
    rises = np.flatnonzero(alignment[1:] > alignment[:-1])
    ends = np.cumsum(room)
    for at in rises.tolist():
        gap = -int(ends[at]) % int(alignment[at + 1])
        room[at] += gap
        ends[at:] += gap
    offsets = ends - room
    return offsets, int(offsets[-1] + nbytes[-1])
