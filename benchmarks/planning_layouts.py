"""The state dicts of the planning benchmark, described rank by rank, without memory.

A job of W ranks with T sharded tensors each, named like those of a transformer and its optimizer,
100 replicated tensors and 10 objects. Belongs here: names, shapes and who holds what. Does not
belong here: how either engine describes that to its coordinator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["LAYOUTS", "Layout", "Part", "object_names", "replicated", "sharded"]

REPLICATED = 100
OBJECTS = 10
NORM = (8192,)
_PARTS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
_TREES = (
    ("model", torch.bfloat16),
    ("optim.exp_avg", torch.float32),
    ("optim.exp_avg_sq", torch.float32),
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How all sharded tensors are cut: over how many mesh dimensions, along which of theirs."""

    title: str
    shapes: tuple[tuple[int, int], ...]
    """Taken in turns."""
    tensor_parallel: int = 1
    """Ranks along the second mesh dimension, which cuts the other dimension."""
    dim: int = 0
    """Cut by the first mesh dimension."""


LAYOUTS = {
    "rows": Layout(
        title="Shard(0), the longest dimension",
        shapes=((28672, 8192), (16384, 4096), (8192, 8192)),
    ),
    "w2": Layout(title="Shard(0), not the longest dimension (w2)", shapes=((8192, 28672),)),
    "columns": Layout(title="Shard(1)", shapes=((8192, 28672), (4096, 8192)), dim=1),
    "grid": Layout(
        title="Shard(0) x Shard(1), 8 along the second",
        shapes=((28672, 8192), (8192, 28672), (8192, 8192)),
        tensor_parallel=8,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank holds of one tensor."""

    fqn: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def sharded(layout: Layout, world_size: int, rank: int, tensors: int) -> Iterator[Part]:
    """This rank's parts of the T sharded tensors."""
    along = min(layout.tensor_parallel, world_size)
    row, column = divmod(rank, along)
    per_tree = -(-tensors // len(_TREES))
    for number in range(tensors):
        tree, of_tree = divmod(number, per_tree)
        layer, part = divmod(of_tree, len(_PARTS))
        root, dtype = _TREES[tree]
        shape = layout.shapes[number % len(layout.shapes)]
        offsets, sizes = [0, 0], list(shape)
        _cut(offsets, sizes, layout.dim, world_size // along, row)
        if along > 1:
            _cut(offsets, sizes, 1 - layout.dim, along, column)
        yield Part(
            fqn=f"{root}.layers.{layer}.{_PARTS[part]}.weight",
            dtype=dtype,
            shape=shape,
            offsets=tuple(offsets),
            sizes=tuple(sizes),
        )


def replicated() -> Iterator[Part]:
    """The tensors that every rank holds whole."""
    for number in range(REPLICATED):
        yield Part(
            fqn=f"model.layers.{number // 2}.norm{number % 2}.weight",
            dtype=torch.float32,
            shape=NORM,
            offsets=(0,),
            sizes=NORM,
        )


def object_names() -> list[str]:
    """The objects that every rank holds."""
    return [f"job.option{number}" for number in range(OBJECTS)]


def _cut(offsets: list[int], sizes: list[int], dim: int, count: int, index: int) -> None:
    """As ``torch.chunk`` cuts."""
    extent = sizes[dim]
    full = -(-extent // count)
    offsets[dim] = min(extent, full * index)
    sizes[dim] = min(extent, full * (index + 1)) - offsets[dim]
