"""Reading checkpoints, whole or in part, on one rank by itself.

Belongs here: ``CheckpointReader``: from what is asked for to one load of the engine, and back.
Does not belong here: what is asked for (``requests``) and loading (``dcp_engine.loader``).
"""

from __future__ import annotations

import os
from typing import Any

from dcp_engine.checkpointer.errors import CheckpointNotFoundError, LoadMismatchError
from dcp_engine.checkpointer.map_location import Placement
from dcp_engine.checkpointer.requests import fill, request_all, request_some
from dcp_engine.checkpointer.stored_tree import stored_tree
from dcp_engine.checkpointer.types import STATE_DICT, RankInfo
from dcp_engine.closing import Closing
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.single import SingleSession
from dcp_engine.default_planner import DefaultLoadPlanner
from dcp_engine.error_context import located
from dcp_engine.errors import (
    CheckpointError,
    CheckpointException,
    ConflictError,
    NotFoundError,
    StateMismatchError,
    StorageError,
    UsageError,
)
from dcp_engine.loader import LoadOptions, LoadReport, load
from dcp_engine.loader.options import PerRankPolicy
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.registry import BackendRegistry
from dcp_engine.state.adapters import GroupRanks

__all__ = ["CheckpointNotFoundError", "CheckpointReader", "LoadMismatchError"]

_ATTEMPTS = 3
"""How often to begin again when the checkpoint is replaced meanwhile."""
_OPTIONS: dict[str, Any] = {"per_rank": "error", "allow_pickle": False}
_PER_RANK: tuple[PerRankPolicy, ...] = ("error", "skip", "list")


class CheckpointReader(Closing):
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
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._read(os.fspath(path), state_dict, placement, options)
            except ConflictError as error:
                if error.kind != "superseded":
                    raise
        return self._read(os.fspath(path), state_dict, placement, options)

    def close(self) -> None:
        """Nothing is held between reads."""

    def _read(
        self,
        path: str,
        state_dict: STATE_DICT | None,
        placement: Placement,
        options: LoadOptions,
    ) -> tuple[STATE_DICT, list[str]]:
        reader = self._columnar(path)
        rank, world_size = self._rank_info.global_rank, self._rank_info.global_world_size
        with located(checkpoint=path, rank=rank):
            try:
                manifest, record = reader.open_checkpoint(path)
                tree = stored_tree(manifest, rank, world_size)
                request = (
                    request_all(tree, placement.device)
                    if state_dict is None
                    else request_some(tree, state_dict, placement.device)
                )
            except NotFoundError as error:
                raise CheckpointNotFoundError.of(error) from error
            finally:
                reader.close_checkpoint()
            destination = dict(request.destination)
            report = _load(path, reader, destination, options, rank)
            if report.save_id != record.save_id:
                raise ConflictError(
                    "the checkpoint was replaced while it was read", kind="superseded"
                )
            values = {
                name: placement.moved(value) if name in request.fresh else value
                for name, value in destination.items()
                if name not in report.skipped
            }
            filled, late = fill(request, values, same_types=options.per_rank != "list")
            return filled, [*request.missing, *report.missing, *late]

    def _columnar(self, path: str) -> ColumnarReader:
        reader = self._registry.reader(path)
        if not isinstance(reader, ColumnarReader):
            raise StorageError(
                f"{type(reader).__name__} does not read dcp_engine's format",
                kind="unsupported_storage",
                checkpoint=path,
                hint="load it with dcp_engine.load",
            )
        return reader


def _load(
    path: str,
    reader: ColumnarReader,
    destination: dict[str, Any],
    options: LoadOptions,
    rank: int,
) -> LoadReport:
    """Load on this rank alone; its failure is raised as it is."""
    try:
        return load(
            SingleSession(run_identity("")),
            destination,
            checkpoint_id=path,
            reader=reader,
            planner=DefaultLoadPlanner(allow_partial_load=True),
            group=GroupRanks(),
            options=options,
        )
    except CheckpointException as error:
        cause = next((failure for failure, _ in error.failures.values()), None)
        if not isinstance(cause, CheckpointError):
            raise
        cause.rank = rank
        if error.hint is not None and error.hint not in (cause.hint or ""):
            cause.hint = "; ".join(filter(None, (cause.hint, error.hint)))
        if isinstance(cause, StateMismatchError):
            raise LoadMismatchError.of(cause) from error
        if isinstance(cause, NotFoundError):
            raise CheckpointNotFoundError.of(cause) from error
        raise cause from error


def _read_options(kwargs: dict[str, Any], rank_info: RankInfo) -> LoadOptions:
    unknown = sorted(kwargs.keys() - _OPTIONS.keys())
    if unknown:
        raise UsageError(
            f"a read has no options {', '.join(unknown)}",
            hint=f"its options are {', '.join(_OPTIONS)}",
        )
    given = {**_OPTIONS, **kwargs}
    if given["per_rank"] not in _PER_RANK:
        raise UsageError(
            f"per_rank is {given['per_rank']!r}",
            hint=f"it is one of {', '.join(map(repr, _PER_RANK))}",
        )
    return LoadOptions(
        per_rank=given["per_rank"],
        allow_pickle=bool(given["allow_pickle"]),
        # What other ranks need does not matter here.
        shared_reads="direct",
        as_rank=(rank_info.global_rank, rank_info.global_world_size),
    )
