"""One rank's offer: flat values as columns.

Belongs here: turning described values into a ``LocalPlan`` and keeping the tensors that its rows
stand for. Does not belong here: finding boxes or shared storage (``state``) and encoding objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dcp_engine.errors import UnsupportedStateError
from dcp_engine.format.dtypes import code_of
from dcp_engine.planning.columns import (
    I32,
    I64,
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
    if not "".join(value.fqn for value in values).isascii():
        for value in values:
            _check_name(value.fqn, rank)
    width = max([1, *(len(value.shape) for value in tensors)])
    kinds = np.array([value.kind for value in tensors], dtype=np.uint8)
    sizes_seen: set[tuple[tuple[int, ...], torch.dtype]] = set()
    for value in tensors:
        if (value.shape, value.dtype) not in sizes_seen:
            _check_size(value, rank)
            sizes_seen.add((value.shape, value.dtype))
    shapes = _box_column([value.shape for value in tensors], width, 1)
    boxes = [
        (row, i)
        for row, value in enumerate(tensors)
        for i, box in enumerate(value.boxes)
        if 0 not in box.sizes
    ]
    plan = LocalPlan(
        tensors=TensorTable(
            names=tuple(value.fqn for value in tensors),
            kinds=kinds,
            dtypes=_dtype_codes(tensors, rank),
            ndims=np.array([len(value.shape) for value in tensors], dtype=np.uint8),
            shapes=shapes,
            owners=np.where(kinds == EntryKind.PER_RANK, rank, NO_OWNER).astype(np.int32),
        ),
        chunks=Chunks(
            tensor=np.array([row for row, _ in boxes], dtype=np.int32),
            offsets=_box_column([tensors[row].boxes[i].offsets for row, i in boxes], width, 0),
            sizes=_box_column([tensors[row].boxes[i].sizes for row, i in boxes], width, 1),
        ),
        aliases=_same_boxes(tensors, np.asarray(aliases, dtype=np.int32)),
        objects=ObjectTable(
            names=tuple(value.fqn for value in objects),
            kinds=np.array([value.kind for value in objects], dtype=np.uint8),
            owners=np.full(len(objects), NO_OWNER, dtype=np.int32),
        ),
        containers=containers,
    )
    return LocalSource(
        plan=plan,
        names=tuple(tensors[row].fqn for row, _ in boxes),
        shapes=tuple(tensors[row].shape for row, _ in boxes),
        tensors=tuple(tensors[row].tensors[i] for row, i in boxes),
        replicated_objects=frozenset(
            value.fqn for value in objects if value.kind is EntryKind.REPLICATED
        ),
    )


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


def _box_column(rows: Sequence[tuple[int, ...]], width: int, fill: int) -> I64:
    padding = [(fill,) * (width - ndim) for ndim in range(width + 1)]
    padded = [(*row, *padding[len(row)]) for row in rows]
    return np.array(padded, np.int64).reshape(len(rows), width)


def _dtype_codes(tensors: Sequence[TensorValue], rank: int) -> U8:
    codes: dict[torch.dtype, int] = {}
    for value in tensors:
        if value.dtype not in codes:
            try:
                codes[value.dtype] = code_of(value.dtype)
            except UnsupportedStateError as error:
                raise error.with_context(tensor=value.fqn, rank=rank) from None
    return np.array([codes[value.dtype] for value in tensors], dtype=np.uint8)


def _check_size(value: TensorValue, rank: int) -> None:
    nbytes = value.dtype.itemsize
    for size in value.shape:
        # Zero-size tensors may have absurd other dimensions; they cost nothing but must fit.
        nbytes *= max(size, 1)
    if nbytes > MAX_TENSOR_BYTES:
        raise UnsupportedStateError(
            f"a tensor of shape {tuple(value.shape)} has more than 2^60 bytes",
            tensor=value.fqn,
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
