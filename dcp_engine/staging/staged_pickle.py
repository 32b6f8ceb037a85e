"""A staged state dict as bytes for a process that maps the same arena: offsets, not tensors.

Belongs here: the pickle of what a worker gets. Does not belong here: the pipe, and who may send
(``executors``): reading these bytes runs code, as any pickle does, and is for bytes of one's own
parent only.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

from dcp_engine.errors import UnsupportedStateError, UsageError
from dcp_engine.staging.arena import Arena
from dcp_engine.state.flatten import flatten

__all__ = ["dump_staged", "load_staged"]

_View = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...], bool]
"""Byte offset, dtype, shape, strides in elements, requires_grad."""


def dump_staged(value: Any, arena: Arena) -> bytes:
    """Pickle ``value``; tensors that lie in ``arena`` become their places there, other ones (in
    objects) travel as bytes, without descriptors.

    Raises ``UnsupportedStateError`` for what cannot be pickled, naming the key if ``value`` is a
    state dict.
    """
    try:
        return _dump(value, arena)
    except Exception as error:
        raise _refusal(value, arena, error) from error


def load_staged(data: bytes, arena: Arena) -> Any:
    """What ``dump_staged`` was given, its tensors views into ``arena``."""
    return _Unpickler(io.BytesIO(data), arena).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, arena: Arena) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._arena = arena

    def persistent_id(self, value: Any) -> _View | None:
        if type(value) is not torch.Tensor or value.layout is not torch.strided:
            return None
        offset = self._arena.offset_of(value)
        if offset is None:
            return None
        return offset, value.dtype, tuple(value.shape), value.stride(), value.requires_grad


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arena: Arena) -> None:
        super().__init__(file)
        self._arena = arena

    def persistent_load(self, place: _View) -> torch.Tensor:
        offset, dtype, shape, strides, requires_grad = place
        elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 in shape:
            elements = 0
        flat = self._arena.view(offset, elements * dtype.itemsize).view(dtype)
        tensor = flat.as_strided(shape, strides, flat.storage_offset())
        return tensor.requires_grad_() if requires_grad else tensor


def _dump(value: Any, arena: Arena) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, arena).dump(value)
    return buffer.getvalue()


def _refusal(value: Any, arena: Arena, error: Exception) -> UnsupportedStateError:
    fqn, culprit = None, value
    if isinstance(value, dict):
        fqn, culprit = _first_refused(value, lambda leaf: _dump(leaf, arena)) or (None, value)
    return UnsupportedStateError(
        f"a {type(culprit).__qualname__} cannot be sent to the worker process: "
        f"{type(error).__name__}: {error}",
        tensor=fqn,
        hint="make it picklable, leave it out, or use the thread executor",
    )


def _first_refused(state: dict[Any, Any], dump: Callable[[Any], object]) -> tuple[str, Any] | None:
    try:
        leaves = flatten(state).leaves
    except (UnsupportedStateError, UsageError):
        return None  # not a state dict; the error names its type then
    for leaf in leaves:
        try:
            dump(leaf.value)
        except Exception:
            return leaf.fqn, leaf.value
    return None
