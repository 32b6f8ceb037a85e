"""What the parent asks its worker, and what that answers: offsets into staging memory, no tensors.

Belongs here: the messages and their encoding. What is pickled in them comes from the worker's own
parent, or from its own worker. Does not belong here: the pipe (``executors.process``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from dcp_engine.native_storage import CommitRecord
from dcp_engine.planning.columns import LocalPlan
from dcp_engine.staging.layout import ArenaLayout

__all__ = [
    "COMMITTED",
    "SAVE",
    "TOUCH",
    "ColumnPart",
    "ColumnStructure",
    "SaveAnswer",
    "SaveNews",
    "SaveRequest",
    "StatePart",
    "TouchRequest",
    "decode",
    "encode",
]

SAVE = "save"
TOUCH = "touch"
"""Kinds of requests."""
COMMITTED = "committed"
"""The phase of a worker whose save is committed, and tidied up after."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnStructure:
    """What stays the same from save to save; sent once, then referred to by its id."""

    plan: LocalPlan
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    replicated_objects: frozenset[str]
    layout: ArenaLayout


class ColumnPart(msgspec.Struct, array_like=True, tag="columns"):
    """A state as columns; its objects are the last row of the layout (``object_blob``)."""

    structure_id: bytes
    structure: bytes | None
    """A pickled ``ColumnStructure``; None if the worker should know it."""
    dedup_to_lowest_rank: bool
    strict_replicas: bool
    compares: bool


class StatePart(msgspec.Struct, array_like=True, tag="state"):
    """A state dict for a planner: both pickled, tensors as places in the arena."""

    state_dict: bytes
    planner: bytes


class SaveRequest(msgspec.Struct, array_like=True):
    """One save."""

    number: int
    session: bytes
    """A pickled ``SessionHandle``."""
    checkpoint: str
    """For messages."""
    checkpoint_id: str | None
    writer: bytes
    """Pickled, like ``options``."""
    options: bytes
    rank: int
    world_size: int
    arena: int
    """Names the arena; its descriptor comes with the first request that does."""
    arena_size: int
    part: ColumnPart | StatePart
    generation: int
    """The latest generation of the workers' group that the parent has heard of."""
    forget_plans: bool


class TouchRequest(msgspec.Struct, array_like=True):
    """Map an arena ahead of the first save."""

    arena: int
    arena_size: int
    touched: int
    """Bytes whose pages are to be in this process's tables too."""


class SaveAnswer(msgspec.Struct, array_like=True):
    """How it went."""

    as_told: bool = False
    """As the last ``SaveNews`` said, which came while the other ranks could not be gone yet."""
    unknown_structure: bool = False
    """Nothing was done: ask again with the structure."""
    unknown_arena: bool = False
    """Nothing was done: ask again with the arena's descriptor."""
    generation: int = 0
    record: CommitRecord | None = None
    metadata: bytes = b""
    """Pickled, where there is no record."""


class SaveNews(msgspec.Struct, array_like=True):
    """How far it is."""

    phase: str
    bytes_done: int
    save_id: str
    """Empty as long as there is none."""
    failure: bytes = b""
    """What the save fails with (``executors.process.packed``), as soon as that is known: before
    the worker tidies up."""
    ended: bool = False
    """This rank's part in the operation is over, but for leaving it."""
    answer: SaveAnswer | None = None
    """With ``ended``: the save is committed."""


_Message = TypeVar("_Message", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> bytes:
    """Bytes of any message of this module."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[_Message]) -> _Message:
    """The message of that kind."""
    return msgspec.msgpack.decode(data, type=kind)
