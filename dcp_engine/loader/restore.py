"""The two ends of a load that both ways share: memory before it, foreign code after it.

Belongs here: what happens to the caller's values besides filling tensors. Does not belong here:
where values lie in the state dict (``destination``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.errors import CheckpointException
from dcp_engine.planning.item_state import materialized
from dcp_engine.state.flatten import Leaf

__all__ = ["partly_filled", "run_restore", "with_memory"]


def with_memory(leaf: Leaf) -> Leaf:
    """The leaf itself, or, for a tensor on the meta device, a leaf with memory to load into."""
    value = leaf.value
    if isinstance(value, torch.Tensor) and value.is_meta:
        return Leaf(fqn=leaf.fqn, path=leaf.path, value=materialized(value), per_rank=leaf.per_rank)
    return leaf


@contextmanager
def partly_filled() -> Iterator[None]:
    """Say in what is raised that some tensors may have been filled already."""
    try:
        yield
    except CheckpointException as error:
        error.hint = "; ".join(
            filter(None, (error.hint, "the tensors of the destination may be partly filled"))
        )
        raise


def run_restore(operation: Operation, restore: Callable[[], bytes], *, together: bool) -> None:
    """Put loaded values in place, on every rank.

    ``together``: some rank hands state to a ``Stateful``, which may fail and take its time, so
    that the others have to hear of it; putting values into containers needs no word.
    """
    if together:
        with partly_filled():
            operation.step("restore", restore, lambda _: Decision())
    else:
        restore()
