"""Checkpoints by objects: long-lived ones that own what they need.

The same checkpoints as ``dcp_engine.save`` and ``load`` make and read, for trainers that want
``checkpointer.save(path, state_dict)``. Belongs here: composition. Processes, staging, barriers
and the format are those of the engine below.
"""

from __future__ import annotations

from dcp_engine.checkpointer.barriers import (
    Barrier,
    BarrierConfig,
    DistBarrier,
    TCPStoreBarrier,
    create_barrier_from_config,
    register_barrier,
)
from dcp_engine.checkpointer.builder import make_async_checkpointer, make_sync_checkpointer
from dcp_engine.checkpointer.checkpoint_process import (
    CheckpointProcess,
    CheckpointProcessConfig,
    RequestType,
    WorkerRequest,
    WorkerResponse,
)
from dcp_engine.checkpointer.checkpoint_reader import CheckpointReader
from dcp_engine.checkpointer.checkpoint_writer import (
    CheckpointWriter,
    CheckpointWriterConfig,
    WriterHook,
)
from dcp_engine.checkpointer.checkpointer import AsyncCheckpointer, Checkpointer, SyncCheckpointer
from dcp_engine.checkpointer.config import CheckpointerConfig
from dcp_engine.checkpointer.errors import CheckpointNotFoundError, LoadMismatchError
from dcp_engine.checkpointer.staging import (
    CheckpointStager,
    CheckpointStagerConfig,
    DefaultStager,
)
from dcp_engine.checkpointer.types import STATE_DICT, RankInfo
from dcp_engine.checkpointer.utils import wrap_future

__all__ = [
    "STATE_DICT",
    "AsyncCheckpointer",
    "Barrier",
    "BarrierConfig",
    "CheckpointNotFoundError",
    "CheckpointProcess",
    "CheckpointProcessConfig",
    "CheckpointReader",
    "CheckpointStager",
    "CheckpointStagerConfig",
    "CheckpointWriter",
    "CheckpointWriterConfig",
    "Checkpointer",
    "CheckpointerConfig",
    "DefaultStager",
    "DistBarrier",
    "LoadMismatchError",
    "RankInfo",
    "RequestType",
    "SyncCheckpointer",
    "TCPStoreBarrier",
    "WorkerRequest",
    "WorkerResponse",
    "WriterHook",
    "create_barrier_from_config",
    "make_async_checkpointer",
    "make_sync_checkpointer",
    "register_barrier",
    "wrap_future",
]
