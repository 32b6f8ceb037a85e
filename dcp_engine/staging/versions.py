"""A best-effort alarm: were tensors changed while they were being copied?

Torch counts in-place changes per tensor. What the counters miss: fused and foreach optimizers on
some paths, FSDP2's writes to local shards, ``.data``, numpy, custom kernels, CUDA graphs, and
inference tensors, which have no counter. The guarantee is ``wait``, never this.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dcp_engine.errors import StagingError
from dcp_engine.state.flatten import Leaf

__all__ = ["VersionAlarm", "outer_tensors"]


def outer_tensors(leaves: Iterable[Leaf]) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a state dict whose counters are not those of what is copied: sharded tensors
    and wrapper subclasses."""
    return [
        (leaf.fqn, leaf.value)
        for leaf in leaves
        if isinstance(leaf.value, torch.Tensor) and type(leaf.value) is not torch.Tensor
    ]


class VersionAlarm:
    """The version counters of tensors at one moment.

    Args:
        tensors: with the names to report them by; of sharded tensors both the outer one and the
            local ones, whose counters are their own.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._seen = [
            (name, tensor, version)
            for name, tensor in tensors
            if (version := _version(tensor)) is not None
        ]

    def check(self) -> None:
        """Raise ``StagingError(kind="staging_torn")`` if a tensor has been changed since."""
        changed = [name for name, tensor, version in self._seen if _version(tensor) != version]
        if changed:
            more = f" and {len(set(changed)) - 1} others" if len(set(changed)) > 1 else ""
            raise StagingError(
                f"{changed[0]!r}{more} changed while the state was being copied to staging memory",
                kind="staging_torn",
                tensor=changed[0],
                hint="call wait_for_staging() before the first write, or install the optimizer "
                "hook, or stage without use_async_staging",
            )


def _version(tensor: torch.Tensor) -> int | None:
    with torch._C.DisableTorchFunctionSubclass():
        return None if tensor.is_inference() else tensor._version
