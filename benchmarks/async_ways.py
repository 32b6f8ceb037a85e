"""The contenders of the asynchronous benchmark: ways to begin a save and to wait for it.

Belongs here: one small class per way. Does not belong here: clocks and rows.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from typing import Any, Protocol

import torch.distributed.checkpoint as torch_dcp  # noqa: TID251
from torch.distributed.checkpoint.staging import (  # noqa: TID251
    DefaultStager,
    StagingOptions,
)
from torch.distributed.checkpoint.state_dict_saver import (  # noqa: TID251
    AsyncCheckpointerType as DcpType,
)

import dcp_engine

__all__ = ["AsyncWay", "DcpAsync", "OursAsync"]


class AsyncWay(Protocol):
    """Begins saves; ``close`` gives back what it holds."""

    name: str
    kept: bool
    """The memory for its copies is."""

    def begin(self, state: dict[str, Any], path: str) -> Future[Any]: ...

    def close(self) -> None: ...


class OursAsync:
    """``Engine.async_save``."""

    def __init__(self, kind: str, *, background: bool = False) -> None:
        self.name = f"ours, {kind}" + (", background staging" if background else "")
        self.kept = True
        self.engine = dcp_engine.Engine()
        self._kind = dcp_engine.AsyncCheckpointerType(kind)
        self._background = background

    def begin(self, state: dict[str, Any], path: str) -> Future[Any]:
        return self.engine.async_save(
            state,
            checkpoint_id=path,
            async_checkpointer_type=self._kind,
            background_staging=self._background,
        )

    def close(self) -> None:
        self.engine.close()


class DcpAsync:
    """torch's ``async_save``: with a new stager each time, as its default is, or with one that is
    kept, in shared memory where the save runs in a process."""

    def __init__(self, kind: str, *, kept: bool) -> None:
        self.name = f"DCP, {kind}" + (", kept stager" if kept else "")
        self.kept = kept
        self._type = DcpType(kind)
        self._stager = None
        if kept:
            self._stager = DefaultStager(StagingOptions(False, kind == "process", False, False))

    def begin(self, state: dict[str, Any], path: str) -> Future[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer = torch_dcp.FileSystemWriter(path, overwrite=True)
            begun = torch_dcp.async_save(
                state,
                storage_writer=writer,
                async_checkpointer_type=self._type,
                async_stager=self._stager,
            )
        return getattr(begun, "upload_completion", begun)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
