"""The states that the I/O benchmark saves: a small language model's, and many small tensors.

Belongs here: shapes and memory. Does not belong here: saving it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = [
    "WIDTH",
    "many_small",
    "model_shapes",
    "model_state",
    "state_bytes",
    "tensors_of",
    "wide_shapes",
]

_BYTES_PER_PARAMETER = 2 + 3 * 4
"""bf16 weights; fp32 master weights, exp_avg and exp_avg_sq."""
_BLOCKS = 10
WIDTH = 4096
"""Elements of a row in ``wide_shapes``."""
_COPIES = (
    ("model", torch.bfloat16),
    ("master", torch.float32),
    ("exp_avg", torch.float32),
    ("exp_avg_sq", torch.float32),
)


def model_shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a decoder with ten blocks whose state takes about ``nbytes``."""
    # 2 embeddings of 32 h rows, and per block 4 h^2 of attention and 3 * 4 h^2 of the MLP.
    hidden = math.isqrt(nbytes // _BYTES_PER_PARAMETER // (32 + _BLOCKS * 16))
    hidden = max(16, hidden // 16 * 16)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (32 * hidden, hidden)}
    for block in range(_BLOCKS):
        name = f"layers.{block}"
        for part in ("wq", "wk", "wv", "wo"):
            shapes[f"{name}.attention.{part}"] = (hidden, hidden)
        for part in ("w1", "w3"):
            shapes[f"{name}.mlp.{part}"] = (4 * hidden, hidden)
        shapes[f"{name}.mlp.w2"] = (hidden, 4 * hidden)
        for part in ("attention_norm", "mlp_norm"):
            shapes[f"{name}.{part}"] = (hidden,)
    shapes["norm"] = (hidden,)
    return shapes


def wide_shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Parameters whose state takes about ``nbytes``, with rows as wide as those of a model of seven
    billion parameters; few, since each takes 235 MB."""
    square = (WIDTH, WIDTH)
    count = max(1, nbytes // (_BYTES_PER_PARAMETER * WIDTH * WIDTH))
    shapes: dict[str, tuple[int, ...]] = {f"layers.{at}.wq": square for at in range(count)}
    return {**shapes, "norm": (WIDTH,)}


def model_state(nbytes: int, seed: int = 0) -> dict[str, Any]:
    """About 370 tensors and a few objects; all pages touched."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Any] = {}
    for copy, dtype in _COPIES:
        state[copy] = {
            name: _filled(shape, dtype, generator) for name, shape in model_shapes(nbytes).items()
        }
    state["trainer"] = {"step": 1234, "lr": 3e-4, "betas": (0.9, 0.95), "run": "benchmark"}
    return state


def many_small(count: int = 20_000, nbytes: int = 1024) -> dict[str, Any]:
    """``count`` tensors of ``nbytes`` bytes, each with memory of its own."""
    return {f"t{i:05d}": torch.full((nbytes // 4,), float(i)) for i in range(count)}


def _filled(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    # Bytes that neither repeat nor take long to make.
    row = torch.randint(0, 255, (min(tensor.nbytes, 1 << 16),), generator=generator)
    flat = tensor.view(-1).view(torch.uint8)
    source = row.to(torch.uint8)
    for begin in range(0, flat.numel(), source.numel()):
        part = flat[begin : begin + source.numel()]
        part.copy_(source[: part.numel()])
    return tensor


def tensors_of(state: Any) -> list[torch.Tensor]:
    """All tensors, in order (of DTensors the local one)."""
    if isinstance(state, torch.Tensor):
        local = getattr(state, "_local_tensor", state)
        return [local]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return []


def state_bytes(state: Any) -> int:
    """Bytes of all local tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(state))
