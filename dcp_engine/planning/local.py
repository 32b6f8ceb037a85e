"""One rank's offer: flat values as columns.

Belongs here: turning described values into a ``LocalPlan`` and keeping the tensors that its rows
stand for. Does not belong here: finding boxes or shared storage (``state``) and encoding objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.format.dtypes import code_of
from dcp_engine.planning.arrays import all_rows, padded_rows
from dcp_engine.planning.columns import (
    I32,
    NO_ALIAS,
    NO_OWNER,
    U8,
    Chunks,
    LocalPlan,
    ObjectTable,
    TensorTable,
)
from dcp_engine.state.values import EntryKind, ObjectValue, TensorValue, Value

__all__ = ["LocalSource", "make_local_plan"]

MAX_TENSOR_BYTES = 1 << 60
"""Keeps every product of sizes inside int64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalSource:
    """A local plan and what stays on the rank: row ``i`` of ``names``, ``shapes`` and ``tensors``
    belongs to row ``i`` of ``plan.chunks``."""

    plan: LocalPlan
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Global shapes."""
    tensors: tuple[torch.Tensor, ...]
    replicated_objects: frozenset[str]
    """Objects that may be stored inline in the manifest."""


def make_local_plan(
    values: Sequence[Value], aliases: I32, containers: bytes, *, rank: int
) -> LocalSource:
    """Describe ``values`` as columns.

    Args:
        values: what this rank holds; names are distinct.
        aliases: (K,) one entry per tensor among ``values``: the position (among the tensors) of
            the one whose storage it shares exactly, ``NO_ALIAS`` or ``UNDECIDED_ALIAS``.
        containers: the nesting of the state dict, encoded.
        rank: of the process group of the operation.

    Raises ``UnsupportedStateError`` for a dtype, a size or a name that cannot be stored.
    """
    tensors = [value for value in values if isinstance(value, TensorValue)]
    objects = [value for value in values if isinstance(value, ObjectValue)]
    names = tuple([value.fqn for value in tensors])
    object_names = tuple([value.fqn for value in objects])
    if not ("".join(names).isascii() and "".join(object_names).isascii()):
        for value in values:
            _check_name(value.fqn, rank)
    global_shapes = [value.shape for value in tensors]
    _check_sizes(tensors, global_shapes, rank)
    width = max([1, *set(map(len, global_shapes))])
    kinds = _bytes_column([value.kind for value in tensors])
    boxes = [value.boxes for value in tensors]
    counts = np.fromiter(map(len, boxes), np.int64, len(boxes))
    flat_boxes = list(chain.from_iterable(boxes))
    sizes = padded_rows([box.sizes for box in flat_boxes], width, 1)
    offsets = padded_rows([box.offsets for box in flat_boxes], width, 0)
    rows = np.repeat(np.arange(len(tensors), dtype=np.int32), counts)
    memory = tuple(chain.from_iterable([value.tensors for value in tensors]))
    filled = np.flatnonzero(all_rows(sizes != 0))
    if len(filled) < len(sizes):
        sizes, offsets, rows = sizes[filled], offsets[filled], rows[filled]
        memory = tuple([memory[i] for i in filled.tolist()])
    plan = LocalPlan(
        tensors=TensorTable(
            names=names,
            kinds=kinds,
            dtypes=_dtype_codes(tensors, rank),
            ndims=_bytes_column(list(map(len, global_shapes))),
            shapes=padded_rows(global_shapes, width, 1),
            owners=np.where(kinds == EntryKind.PER_RANK, rank, NO_OWNER).astype(np.int32),
        ),
        chunks=Chunks(tensor=rows, offsets=offsets, sizes=sizes),
        aliases=_same_boxes(tensors, np.asarray(aliases, dtype=np.int32)),
        objects=ObjectTable(
            names=object_names,
            kinds=_bytes_column([value.kind for value in objects]),
            owners=np.full(len(objects), NO_OWNER, dtype=np.int32),
        ),
        containers=containers,
    )
    one_each = len(rows) == len(tensors) and bool((counts == 1).all())
    of_chunks = None if one_each else rows.tolist()
    return LocalSource(
        plan=plan,
        names=names if of_chunks is None else tuple([names[row] for row in of_chunks]),
        shapes=tuple(global_shapes)
        if of_chunks is None
        else tuple([global_shapes[row] for row in of_chunks]),
        tensors=memory,
        replicated_objects=frozenset(
            value.fqn for value in objects if value.kind is EntryKind.REPLICATED
        ),
    )


def _bytes_column(values: list[int]) -> U8:
    """Small numbers, enum members among them, which numpy alone converts slowly."""
    return np.frombuffer(bytes(values), np.uint8).copy()


def _same_boxes(tensors: Sequence[TensorValue], aliases: I32) -> I32:
    """Two DTensors can share their local memory and still be different parts of their globals."""
    result = aliases.copy()
    for row in np.flatnonzero(aliases >= 0).tolist():
        mine, other = tensors[row], tensors[int(aliases[row])]
        if (mine.kind, mine.dtype, mine.shape, mine.boxes) != (
            other.kind,
            other.dtype,
            other.shape,
            other.boxes,
        ):
            result[row] = NO_ALIAS
    return result


def _dtype_codes(tensors: Sequence[TensorValue], rank: int) -> U8:
    dtypes = [value.dtype for value in tensors]
    codes: dict[torch.dtype, int] = {}
    for dtype in set(dtypes):
        try:
            codes[dtype] = code_of(dtype)
        except UnsupportedStateError as error:
            name = tensors[dtypes.index(dtype)].fqn
            raise error.with_context(tensor=name, rank=rank) from None
    return _bytes_column([codes[dtype] for dtype in dtypes])


def _check_sizes(
    tensors: Sequence[TensorValue], shapes: Sequence[tuple[int, ...]], rank: int
) -> None:
    dtypes = [value.dtype for value in tensors]
    for shape, dtype in set(zip(shapes, dtypes, strict=True)):
        nbytes = dtype.itemsize
        for size in shape:
            # Zero-size tensors may have absurd other dimensions; they cost nothing but must fit.
            nbytes *= max(size, 1)
        if nbytes > MAX_TENSOR_BYTES:
            raise UnsupportedStateError(
                f"a tensor of shape {tuple(shape)} has more than 2^60 bytes",
                tensor=tensors[shapes.index(shape)].fqn,
                rank=rank,
            )


def _check_name(name: str, rank: int) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise UnsupportedStateError(
            f"the key {name!r} is not valid UTF-8",
            tensor=repr(name),
            rank=rank,
            hint="rename the key; manifests and safetensors headers are UTF-8",
        ) from None
