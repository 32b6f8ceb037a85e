"""Small states that the tests of this directory save and load."""

from __future__ import annotations

from typing import Any

import torch


def state(seed: float = 1.0, numel: int = 200_000) -> dict[str, Any]:
    """Tensors of several files' worth of kinds, and objects."""
    return {
        "model": {
            "weight": torch.arange(numel, dtype=torch.float32) * seed,
            "turned": (torch.arange(12_000, dtype=torch.float64) * seed).reshape(120, 100).t(),
            "small": torch.full((3,), seed, dtype=torch.bfloat16),
            "empty": torch.empty(0, 4),
        },
        "step": int(seed * 10),
        "names": ["a", "b"],
    }


def empty(numel: int = 200_000) -> dict[str, Any]:
    """Where ``state`` is loaded to."""
    return {
        "model": {
            "weight": torch.zeros(numel),
            "turned": torch.zeros(100, 120, dtype=torch.float64),
            "small": torch.zeros(3, dtype=torch.bfloat16),
            "empty": torch.empty(0, 4),
        },
        "step": 0,
        "names": [],
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The keys at which two of them differ."""
    wrong = [
        name
        for name, tensor in expected["model"].items()
        if not torch.equal(found["model"][name], tensor)
    ]
    return wrong + [key for key in ("step", "names") if found[key] != expected[key]]
