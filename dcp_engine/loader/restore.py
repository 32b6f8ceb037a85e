"""The two ends of a load that both ways share: memory before it, foreign code after it.

Belongs here: what happens to the caller's values besides filling tensors, and closing the reader.
Does not belong here: where values lie in the state dict (``destination``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dcp_engine.coordination.failures import raised_by_exit
from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.errors import CheckpointException
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.planning.item_state import materialized
from dcp_engine.state.flatten import Leaf

logger = logging.getLogger(__name__)

__all__ = ["closing", "partly_filled", "run_restore", "with_memory"]


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


@contextmanager
def closing(reader: ColumnarReader) -> Iterator[None]:
    """Close the checkpoint in the end. Failing to neither fails a load nor hides why it failed."""
    try:
        yield
    finally:
        try:
            reader.close_checkpoint()
        except BaseException as error:
            if raised_by_exit(error):
                raise
            logger.exception("%s could not close the checkpoint", type(reader).__name__)


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
