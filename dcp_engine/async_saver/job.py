"""One asynchronous save, as the engine orders it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from dcp_engine.coordination.interface import Session
from dcp_engine.saver import PlanMemory, SaveOptions
from dcp_engine.saver.save import extra_contents
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

    def as_of_now(self) -> SaveJob:
        """With what the caller's metadata and files hold now: that is what is saved, not what they
        hold in a minute. May fail on one rank only, so that the others have to be told."""
        options = self.options
        mine = self.group.rank == options.coordinator_rank
        return replace(
            self,
            options=replace(
                options,
                extra_files=extra_contents(options) if mine else {},
                user_metadata=copy.deepcopy(dict(options.user_metadata)),
            ),
        )

    @property
    def compares(self) -> bool:
        """Whether there are other ranks to compare replicated values with."""
        return self.options.use_collectives and self.session.world_size > 1
