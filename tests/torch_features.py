"""What the installed torch can do, for tests whose expectations are made with torch itself.

Each is found by trying, and says which version has it. Does not belong here: features that the
package itself depends on.
"""

from __future__ import annotations

import inspect

import torch
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

__all__ = ["CPU_FSDP", "EMPTY_SHARDS_WRAPPER", "LOCAL_PARALLELIZE", "UNEVEN_STRIDED_SHARD"]


def _cuts_strided_shards_unevenly() -> bool:
    try:
        parts, _ = _StridedShard(0, split_factor=2)._split_tensor(
            torch.arange(5), 2, with_padding=False
        )
    except AssertionError:
        return False
    return [part.tolist() for part in parts] == [[0, 1, 3], [2, 4]]


def _has_empty_shards_wrapper() -> bool:
    try:
        LocalShardsWrapper([], [])
    except AssertionError:
        return False
    return True


CPU_FSDP = hasattr(torch.cpu.Stream, "record_event")
"""FSDP2 trains on CPU: not in 2.6."""

UNEVEN_STRIDED_SHARD = _cuts_strided_shards_unevenly()
"""``_StridedShard`` cuts sizes that do not divide, and does so piece by piece: not in 2.6, which
refuses them, nor in 2.8, which cuts them otherwise."""

EMPTY_SHARDS_WRAPPER = _has_empty_shards_wrapper()
"""``LocalShardsWrapper`` may hold no shard: not in 2.6."""

LOCAL_PARALLELIZE = "src_data_rank" in inspect.signature(parallelize_module).parameters
"""``parallelize_module`` can cut what each rank has, without a message: not in 2.6."""
