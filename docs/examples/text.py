"""Text that every machine has: the sources of Python's standard library, as bytes.

The order of the data is a function of the seed alone, and a batch is a function of the position
in that order, so a job that resumes sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

__all__ = ["Windows", "read_corpus"]


def read_corpus(limit: int = 4 * 2**20) -> torch.Tensor:
    """The first ``limit`` bytes of the top-level modules of the standard library, by name, as a
    1-D tensor of uint8."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


class Windows:
    """Windows of ``length + 1`` bytes of a text, in an order drawn anew for each epoch."""

    def __init__(self, text: torch.Tensor, length: int, seed: int) -> None:
        self._windows = text[: len(text) // (length + 1) * (length + 1)].view(-1, length + 1)
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, position: int, count: int) -> torch.Tensor:
        """Windows ``position`` to ``position + count`` as an int64 tensor of shape
        ``(count, length + 1)``. Does not touch the global random state."""
        rows = [self._at(i) for i in range(position, position + count)]
        return torch.stack(rows).to(torch.int64)

    def _at(self, position: int) -> torch.Tensor:
        epoch, row = divmod(position, len(self))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self), generator=generator)
            self._epoch = epoch
        return self._windows[self._order[row]]
