"""One asynchronous save, as the engine orders it."""

from __future__ import annotations

from dataclasses import dataclass

from dcp_engine.coordination.interface import Session
from dcp_engine.saver import PlanMemory, SaveOptions
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.storage import StorageWriter

__all__ = ["SaveJob"]


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """Everything about a save but the state."""

    session: Session
    """Of all ranks that save together; of this rank alone when the save is collective-free."""
    number: int
    """Of the operation, taken from the session on the calling thread."""
    checkpoint_id: str | None
    writer: StorageWriter
    group: GroupRanks
    world_size: int
    memory: PlanMemory
    """For saves in this process."""
    options: SaveOptions

    @property
    def compares(self) -> bool:
        """Whether there are other ranks to compare replicated values with."""
        return self.options.use_collectives and self.session.world_size > 1
