"""The public helper of torch's module of this name, for planners that make their own items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dcp_engine.metadata import ChunkStorageMetadata
from dcp_engine.plan import ReadItem
from dcp_engine.planning.items import read_items
from dcp_engine.state.values import Box, EntryKind, TensorValue

__all__ = ["create_read_items_for_chunk_list"]


def create_read_items_for_chunk_list(
    fqn: str, checkpoint_md: Any, local_chunks: Sequence[ChunkStorageMetadata]
) -> list[ReadItem]:
    """The items that fill ``local_chunks`` of tensor ``fqn`` from what is stored, resharding
    where needed.

    Args:
        checkpoint_md: the tensor's ``TensorStorageMetadata``, the engine's or torch's.
        local_chunks: boxes of the global tensor; an item's ``dest_index.index`` is the position
            in this list.
    Raises:
        DamagedCheckpointError: the stored chunks do not cover a box exactly once.
    """
    wanted = TensorValue(
        fqn=fqn,
        kind=EntryKind.SHARDED,
        dtype=checkpoint_md.properties.dtype,
        shape=tuple(checkpoint_md.size),
        boxes=tuple(
            Box(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes)) for chunk in local_chunks
        ),
        tensors=(),
    )
    return read_items(wanted, checkpoint_md)
