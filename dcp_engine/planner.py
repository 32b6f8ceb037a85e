"""The planner interfaces: who decides which rank writes and reads what.

Subclass ``DefaultSavePlanner`` or ``DefaultLoadPlanner`` (``default_planner``) unless you want
to own the whole decision. A planner written for torch's DCP works after changing its imports.
"""

from __future__ import annotations

import abc
import io

import torch

from dcp_engine.metadata import STATE_DICT_TYPE, Metadata, StorageMeta
from dcp_engine.plan import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

__all__ = [
    "BytesIOWriteData",
    "LoadItemType",
    "LoadPlan",
    "LoadPlanner",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "TensorWriteData",
    "WriteItem",
    "WriteItemType",
]


class SavePlanner(abc.ABC):
    """Decides what a save writes, and hands out the data.

    Called in this order: ``set_up_planner`` (every rank), ``create_local_plan`` (every rank),
    ``create_global_plan`` (coordinator only), ``finish_plan`` (every rank), ``resolve_data``
    (every rank, at least once per item of its final plan that has bytes, possibly from several
    threads).
    """

    @abc.abstractmethod
    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take over what this save is about; it is not passed again."""

    @abc.abstractmethod
    def create_local_plan(self) -> SavePlan:
        """Return what this rank has to offer."""

    @abc.abstractmethod
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return every rank's plan, in rank order, and the checkpoint's metadata."""

    @abc.abstractmethod
    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Accept this rank's part of the global plan; return the plan to carry out."""

    @abc.abstractmethod
    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the data of ``write_item``. Must be idempotent and safe to call from threads.

        Tensors may lie on any device and may be views; allocate as late as possible.
        """


class LoadPlanner:
    """Decides what a load reads, and takes the data.

    Called in this order: ``set_up_planner`` (every rank), ``create_local_plan`` (every rank),
    ``create_global_plan`` (coordinator only), ``finish_plan`` (every rank), then for each item
    ``load_bytes``, or ``resolve_tensor`` followed by ``commit_tensor``.

    As in torch's DCP, a planner may leave out methods that its loads never call.
    """

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take over the destination and what the checkpoint holds."""
        raise _missing(self, "set_up_planner")

    def create_local_plan(self) -> LoadPlan:
        """Return what this rank wants to read."""
        raise _missing(self, "create_local_plan")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return every rank's plan, in rank order."""
        raise _missing(self, "create_global_plan")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Accept this rank's part of the global plan; return the plan to carry out."""
        raise _missing(self, "finish_plan")

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Store the value that ``value`` encodes in the state dict."""
        raise _missing(self, "load_bytes")

    def resolve_bytes(self, read_item: ReadItem) -> io.BytesIO:
        """Return a buffer for a reader that wants to fill one; optional."""
        raise _missing(self, "resolve_bytes")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return a tensor of shape ``read_item.lengths`` to read into."""
        raise _missing(self, "resolve_tensor")

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Called when ``tensor``, which ``resolve_tensor`` returned, has been filled."""
        raise _missing(self, "commit_tensor")


def _missing(planner: LoadPlanner, method: str) -> NotImplementedError:
    return NotImplementedError(f"{type(planner).__name__} does not define {method}")
