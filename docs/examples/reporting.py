"""What the example leaves behind for whoever watches it: who runs, who has finished, and the
digest of every tensor. A training script of your own needs none of this."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

__all__ = ["digest", "mark_finished", "mark_started", "tensors_by_name", "write_digests"]


def mark_started(directory: Path, rank: int) -> None:
    """Leave this rank's process id."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"rank{rank}.pid").write_text(str(os.getpid()))


def mark_finished(directory: Path, rank: int) -> None:
    """Say that this rank has done all its work. Whatever happens to the process afterwards (torch
    may abort while the interpreter shuts down) takes nothing back."""
    (directory / f"rank{rank}.finished").touch()


def tensors_by_name(tree: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors below ``tree`` under their fully qualified names."""
    found: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            found |= tensors_by_name(value, f"{prefix}{key}.")
    return found


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a whole tensor."""
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def write_digests(file: Path, tree: Mapping[str, Any], rank: int) -> None:
    """Gather every tensor and let rank 0 write its digest to ``file``. All ranks call it."""
    digests = {}
    for name, tensor in tensors_by_name(tree).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank == 0:
            digests[name] = digest(whole)
    if rank == 0:
        file.write_text(json.dumps(digests, indent=1))
