"""Reading checkpoints, whole or in part, on one rank by itself.

Belongs here: ``CheckpointReader``: from what is asked for to one load of the engine, and back.
Does not belong here: what is asked for (``requests``) and loading (``dcp_engine.loader``).
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch

from dcp_engine.checkpointer.errors import CheckpointNotFoundError, LoadMismatchError
from dcp_engine.checkpointer.map_location import Placement
from dcp_engine.checkpointer.requests import Request, compare, fill, request_all, request_some
from dcp_engine.checkpointer.types import STATE_DICT, RankInfo
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.single import SingleSession
from dcp_engine.default_planner import DefaultLoadPlanner
from dcp_engine.error_context import located
from dcp_engine.errors import (
    CheckpointError,
    CheckpointException,
    ConflictError,
    NotFoundError,
    StorageError,
    UsageError,
)
from dcp_engine.format.manifest import Manifest
from dcp_engine.loader import LoadOptions, LoadReport, load
from dcp_engine.loader.options import PerRankPolicy
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.registry import BackendRegistry
from dcp_engine.state.adapters import GroupRanks

__all__ = ["CheckpointNotFoundError", "CheckpointReader", "LoadMismatchError"]

_ATTEMPTS = 3
"""How often to begin again when the checkpoint is replaced meanwhile."""
_OPTIONS = ("per_rank", "allow_pickle")


class CheckpointReader:
    """Reads checkpoints of this layer and of ``dcp_engine.save``. A context manager.

    Each rank reads for itself, when it wants to. What is sharded comes in any sharding, or whole;
    what is each rank's own comes to the rank that wrote it; what is replicated to every rank.

    Args:
        rank_info: whose values to read.
        registry: finds the storage backend of a path; by default what is installed.
    """

    def __init__(self, rank_info: RankInfo, *, registry: BackendRegistry | None = None) -> None:
        self._rank_info = rank_info
        self._registry = registry if registry is not None else BackendRegistry()

    def read(
        self,
        path: str | os.PathLike[str],
        state_dict: STATE_DICT | None = None,
        *,
        map_location: Any = None,
        **kwargs: Any,
    ) -> tuple[STATE_DICT, list[str]]:
        """Read a checkpoint.

        Args:
            path: path or URL.
            state_dict: what to read. Tensors (sharded ones too) are filled in place, other leaves
                replaced; None in the place of a leaf or of a container stands for whatever is
                there. Nothing else is read. Lists come as long as they were stored. None reads
                everything this rank has a part in, sharded tensors whole.
            map_location: where tensors go that have no destination, as in ``torch.load``: a
                device, a dict from ``"cpu"`` to one, or a function of storage and ``"cpu"``.
            kwargs: ``per_rank``, for values of their own that other ranks than these wrote, and
                differ: ``"error"``, ``"skip"`` or ``"list"``, as in ``dcp_engine.load``;
                ``allow_pickle=True`` executes pickles: for checkpoints you trust.

        Returns:
            ``(state_dict, missing)``: the state dict that was given, or a new one; and the keys
            of it that are not stored, like ``"model.layers[0].weight"``, which keep their values.

        Raises:
            CheckpointNotFoundError: (a ``FileNotFoundError``) there is no checkpoint.
            LoadMismatchError: (a ``RuntimeError``) a destination has another shape, dtype or type.
            CheckpointError: what is stored cannot be read; see ``kind``.
        """
        options = _read_options(kwargs, self._rank_info)
        placement = Placement(map_location)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._read(os.fspath(path), state_dict, placement, options)
            except ConflictError as error:
                if error.kind != "superseded" or attempt == _ATTEMPTS:
                    raise
        raise UsageError("unreachable")

    def close(self) -> None:
        """Nothing is held between reads."""

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(
        self,
        path: str,
        state_dict: STATE_DICT | None,
        placement: Placement,
        options: LoadOptions,
    ) -> tuple[STATE_DICT, list[str]]:
        reader = self._columnar(path)
        rank = self._rank_info.global_rank
        with located(checkpoint=path, rank=rank):
            try:
                manifest, record = reader.open_checkpoint(path)
                request = self._request(manifest, state_dict, placement)
            except NotFoundError as error:
                raise CheckpointNotFoundError.of(error) from error
            finally:
                reader.close_checkpoint()
        destination = dict(request.destination)
        report = self._load(path, reader, destination, options)
        if report.save_id != record.save_id:
            raise ConflictError(
                "the checkpoint was replaced while it was read", kind="superseded", checkpoint=path
            )
        skipped = {name for name in request.destination if destination[name] is request.unset}
        values = {
            name: placement.moved(value) if name in request.fresh else value
            for name, value in destination.items()
            if name not in skipped
        }
        with located(checkpoint=path, rank=rank):
            compare(request, values)
        missing = [*request.missing, *report.missing]
        return fill(request, values, state_dict), missing

    def _request(
        self, manifest: Manifest, state_dict: STATE_DICT | None, placement: Placement
    ) -> Request:
        rank, world_size = self._rank_info.global_rank, self._rank_info.global_world_size
        if state_dict is None:
            return request_all(manifest, rank, world_size, placement.device)
        return request_some(manifest, state_dict, rank, world_size, placement.device)
