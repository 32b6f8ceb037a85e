"""The optimizer hook: no step before staging is done."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["install_staging_hook"]


def install_staging_hook(
    optimizer: torch.optim.Optimizer, wait: Callable[[], object]
) -> RemovableHandle:
    """Have every ``optimizer.step()`` call ``wait`` first, before its other pre-hooks.

    Args:
        wait: returns when no staging reads the state any more: ``Staging.wait``, or the engine's
            ``wait_for_staging``. What it raises, ``step`` raises.
    Returns:
        A handle; its ``remove()`` takes the hook away.

    Covers what ``step`` changes. Whoever changes staged state elsewhere (clipping parameters,
    an exponential moving average, buffers in a forward pass) calls ``wait`` there too.
    """

    def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        wait()

    handle = optimizer.register_step_pre_hook(before_step)
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    if isinstance(hooks, OrderedDict) and handle.id in hooks:
        hooks.move_to_end(handle.id, last=False)  # other pre-hooks may write
    return handle
