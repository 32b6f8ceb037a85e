"""All options of a checkpointer in one place.

Belongs here: ``CheckpointerConfig`` and nothing else. Each part's options stand beside that part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dcp_engine.checkpointer.barriers import BarrierConfig
from dcp_engine.checkpointer.checkpoint_process import CheckpointProcessConfig
from dcp_engine.checkpointer.checkpoint_writer import CheckpointWriterConfig
from dcp_engine.checkpointer.staging import CheckpointStagerConfig

__all__ = ["CheckpointerConfig"]


@dataclass
class CheckpointerConfig:
    """What ``make_sync_checkpointer`` and ``make_async_checkpointer`` make the parts with."""

    writer_config: CheckpointWriterConfig = field(default_factory=CheckpointWriterConfig)
    barrier_config: BarrierConfig = field(default_factory=BarrierConfig)
    staging_config: CheckpointStagerConfig = field(default_factory=CheckpointStagerConfig)
    """Asynchronous checkpointers only."""
    process_config: CheckpointProcessConfig = field(default_factory=CheckpointProcessConfig)
    """Asynchronous checkpointers only."""
