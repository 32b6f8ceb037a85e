"""A distributed sharded checkpoint engine for PyTorch, with the verbs of its DCP.

``import dcp_engine as dcp``; the names here are the public ones. Storage backends come in through
the registry; their classes are reachable here too, and imported when they are first looked at.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dcp_engine.async_saver import AsyncCheckpointerType, AsyncSaveResponse, Progress
from dcp_engine.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_load_plan,
    create_default_global_save_plan,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from dcp_engine.engine import (
    Engine,
    async_save,
    default_engine,
    latest,
    load,
    read_extra,
    save,
    verify,
)
from dcp_engine.engine import open_checkpoint as open
from dcp_engine.errors import (
    CheckpointError,
    CheckpointException,
    ConflictError,
    CoordinationError,
    DamagedCheckpointError,
    InvalidPlanError,
    NotFoundError,
    StagingError,
    StateMismatchError,
    StorageError,
    UnsafeContentError,
    UnsupportedStateError,
    UnsupportedVersionError,
    UsageError,
)
from dcp_engine.loader import LoadReport
from dcp_engine.loader.latest import Latest, PassedOver
from dcp_engine.loader.random_access import Checkpoint, LazyObject, LazyTensor
from dcp_engine.loader.verify import VerifyReport
from dcp_engine.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_engine.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from dcp_engine.saver.compare import ReplicasDifferWarning
from dcp_engine.staging.hooks import install_staging_hook
from dcp_engine.staging.stagers import (
    AsyncStager,
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)
from dcp_engine.state.per_rank import PerRank
from dcp_engine.stateful import Stateful
from dcp_engine.storage import (
    ByteStore,
    ByteStoreFile,
    ReadRange,
    StorageReader,
    StorageWriter,
    StoredFile,
    WriteResult,
)

if TYPE_CHECKING:
    from dcp_engine import api as api
    from dcp_engine import filesystem as filesystem
    from dcp_engine import planner_helpers as planner_helpers
    from dcp_engine import state_dict_loader as state_dict_loader
    from dcp_engine import state_dict_saver as state_dict_saver
    from dcp_engine.checkpointer import (
        STATE_DICT,
        AsyncCheckpointer,
        Barrier,
        BarrierConfig,
        Checkpointer,
        CheckpointerConfig,
        CheckpointNotFoundError,
        CheckpointProcess,
        CheckpointProcessConfig,
        CheckpointReader,
        CheckpointStager,
        CheckpointStagerConfig,
        CheckpointWriter,
        CheckpointWriterConfig,
        DistBarrier,
        LoadMismatchError,
        RankInfo,
        RequestType,
        SyncCheckpointer,
        TCPStoreBarrier,
        WorkerRequest,
        WorkerResponse,
        WriterHook,
        create_barrier_from_config,
        make_async_checkpointer,
        make_sync_checkpointer,
        register_barrier,
    )
    from storage_backends.filesystem import FileSystemReader, FileSystemWriter
    from storage_backends.fsspec import FsspecReader, FsspecWriter
    from storage_backends.prune import prune

__all__ = [
    "STATE_DICT",
    "AsyncCheckpointer",
    "AsyncCheckpointerType",
    "AsyncSaveResponse",
    "AsyncStager",
    "Barrier",
    "BarrierConfig",
    "BlockingAsyncStager",
    "ByteStore",
    "ByteStoreFile",
    "BytesIOWriteData",
    "BytesStorageMetadata",
    "Checkpoint",
    "CheckpointError",
    "CheckpointException",
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
    "ChunkStorageMetadata",
    "ConflictError",
    "CoordinationError",
    "DamagedCheckpointError",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "DefaultStager",
    "DistBarrier",
    "Engine",
    "FileSystemReader",
    "FileSystemWriter",
    "FsspecReader",
    "FsspecWriter",
    "InvalidPlanError",
    "Latest",
    "LazyObject",
    "LazyTensor",
    "LoadItemType",
    "LoadMismatchError",
    "LoadPlan",
    "LoadPlanner",
    "LoadReport",
    "Metadata",
    "MetadataIndex",
    "NotFoundError",
    "PassedOver",
    "PerRank",
    "Progress",
    "RankInfo",
    "ReadItem",
    "ReadRange",
    "ReplicasDifferWarning",
    "RequestType",
    "SavePlan",
    "SavePlanner",
    "StagingError",
    "StagingOptions",
    "StateMismatchError",
    "Stateful",
    "StorageError",
    "StorageMeta",
    "StorageReader",
    "StorageWriter",
    "StoredFile",
    "SyncCheckpointer",
    "TCPStoreBarrier",
    "TensorProperties",
    "TensorStorageMetadata",
    "TensorWriteData",
    "UnsafeContentError",
    "UnsupportedStateError",
    "UnsupportedVersionError",
    "UsageError",
    "VerifyReport",
    "WorkerRequest",
    "WorkerResponse",
    "WriteItem",
    "WriteItemType",
    "WriteResult",
    "WriterHook",
    "async_save",
    "create_barrier_from_config",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
    "default_engine",
    "install_staging_hook",
    "latest",
    "load",
    "make_async_checkpointer",
    "make_sync_checkpointer",
    "open",
    "prune",
    "read_extra",
    "register_barrier",
    "save",
    "verify",
]

_LAZY = {
    **dict.fromkeys(
        (
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
        ),
        "dcp_engine.checkpointer",
    ),
    "FileSystemReader": "storage_backends.filesystem",
    "FileSystemWriter": "storage_backends.filesystem",
    "FsspecReader": "storage_backends.fsspec",
    "FsspecWriter": "storage_backends.fsspec",
    "prune": "storage_backends.prune",
}
"""Names of built-in backends: the engine itself imports none. And of the layer above the engine."""

_LAZY_MODULES = frozenset(
    {"api", "filesystem", "planner_helpers", "state_dict_loader", "state_dict_saver"}
)
"""Modules under DCP's names that nothing here imports, which are attributes of DCP's package."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
