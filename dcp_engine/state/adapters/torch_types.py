"""Which kind of torch value something is, without importing what the process does not use.

A value cannot be of a class whose module was never imported; looking in ``sys.modules`` keeps
``torch.distributed`` off the import path of processes that have no use for it, and keeps torch's
private classes from being a hard dependency.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = [
    "has_checkpoint_methods",
    "has_own_dispatch",
    "is_async_collective",
    "is_dtensor",
    "is_fake",
    "is_sharded_tensor",
]


def _is_instance(value: object, module: str, name: str) -> bool:
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and isinstance(value, cls)


def is_dtensor(value: object) -> bool:
    """Is ``value`` a ``DTensor``?"""
    return _is_instance(value, "torch.distributed.tensor", "DTensor")


def is_sharded_tensor(value: object) -> bool:
    """Is ``value`` a ``ShardedTensor``?"""
    return _is_instance(value, "torch.distributed._shard.sharded_tensor", "ShardedTensor")


def is_async_collective(value: object) -> bool:
    """Is ``value`` the result of a functional collective that may still be running?"""
    module = "torch.distributed._functional_collectives"
    return _is_instance(value, module, "AsyncCollectiveTensor")


def is_fake(value: torch.Tensor) -> bool:
    """Is ``value`` a tensor without data, of ``FakeTensorMode`` or functionalization?"""
    return _is_instance(value, "torch._subclasses.fake_tensor", "FakeTensor") or _is_instance(
        value, "torch._subclasses.functional_tensor", "FunctionalTensor"
    )


def has_checkpoint_methods(value: Any) -> bool:
    """Does the class of ``value`` describe itself through torch's ``_Checkpointable`` methods?"""
    return hasattr(type(value), "__create_write_items__")


def has_own_dispatch(value: torch.Tensor) -> bool:
    """Does the class of ``value`` decide what operations mean, so that its memory (if it has
    any) is not its content?"""
    return type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
