"""Whole tensors as raw bytes: made, cut and compared without the engine, for every dtype.

``raw`` is a uint8 tensor of shape ``(*shape, itemsize)``. Cutting it along the leading dimensions
is cutting the tensor, whatever its dtype can do; comparing bytes also compares NaNs.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

__all__ = ["Memory", "Place", "flipped", "place", "raw_of"]

Memory = Literal["contiguous", "permuted", "window"]
_GUARD = 1


def raw_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The content of the tensor called ``name``: random, the same on every call."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    top = 2 if dtype is torch.bool else 256
    return torch.from_numpy(random.integers(0, top, (*shape, dtype.itemsize), dtype=np.uint8))


def flipped(raw: torch.Tensor) -> torch.Tensor:
    """Other bytes everywhere, for a destination: what a load does not fill is seen."""
    return raw ^ 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor in memory of its own."""

    tensor: torch.Tensor
    raw: torch.Tensor
    """The same memory, byte by byte."""
    around: torch.Tensor
    """The raw memory that it is a part of."""

    def is_intact(self) -> bool:
        """Whether nothing beside the tensor was written. Overwrites the tensor."""
        if self.around is not self.raw:
            self.raw.fill_(_GUARD)
        return self.around is self.raw or bool((self.around == _GUARD).all())


def place(raw: torch.Tensor, dtype: torch.dtype, memory: Memory) -> Place:
    """``raw`` as a tensor: packed, with its dimensions in another order, or inside a larger one.

    All copies are made of bytes: not every dtype can be copied.
    """
    *shape, itemsize = raw.shape
    if memory == "window":
        around = torch.full((*(n + 2 for n in shape), 3, itemsize), _GUARD, dtype=torch.uint8)
        window, typed = around.select(-2, 1), _typed(around, dtype).select(-1, 1)
        for dim, n in enumerate(shape):
            window, typed = window.narrow(dim, 1, n), typed.narrow(dim, 1, n)
        window.copy_(raw)
        return Place(tensor=typed, raw=window, around=around)
    order = list(range(len(shape)))
    if memory == "permuted":
        order.reverse()
    packed = raw.permute(*order, len(shape)).contiguous().clone()
    unpacked = packed.permute(*order, len(shape))
    return Place(tensor=_typed(packed, dtype).permute(order), raw=unpacked, around=unpacked)


def _typed(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not raw.numel():  # memory without bytes cannot be viewed
        return torch.empty(raw.shape[:-1], dtype=dtype)
    return raw.view(dtype).squeeze(-1)
