"""What one rank reads: wanted boxes against stored chunks.

Belongs here: matching a destination with a manifest, and the refusals when they do not fit. Does
not belong here: overlaps (``load_parts``, ``load_together``), bytes and ranges (``geometry.runs``,
the reader), and objects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dcp_engine.errors import StateMismatchError
from dcp_engine.format.manifest import Manifest, StoredTensor
from dcp_engine.planning.columns import LoadColumns
from dcp_engine.planning.load_parts import LoadParts
from dcp_engine.planning.load_together import plan_together
from dcp_engine.planning.missing_keys import missing_key
from dcp_engine.state.values import Box, TensorValue

__all__ = [
    "LoadSource",
    "PerRankPolicy",
    "make_load_columns",
    "plan_boxes",
    "stored_names",
    "unexpected_keys",
]

PerRankPolicy = Literal["error", "skip", "list"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadSource:
    """What one rank reads into which tensors."""

    columns: LoadColumns
    tensors: tuple[torch.Tensor, ...]
    """The destinations that ``columns.dest`` refers to."""
    lists: tuple[tuple[str, tuple[torch.Tensor, ...]], ...]
    """With ``per_rank="list"`` at another world size: name, and every saving rank's tensor (new,
    on the CPU, to be put in place of the value), by rank."""
    missing: tuple[str, ...]
    """Wanted tensors that are not stored (``strict=False``), in order."""
    skipped: tuple[str, ...]
    """Per-rank tensors of another world size that stay as they are."""


def make_load_columns(
    wanted: Sequence[TensorValue],
    manifest: Manifest,
    *,
    rank: int,
    world_size: int,
    strict: bool = True,
    per_rank: PerRankPolicy = "error",
    agreeing: Collection[str] = (),
) -> LoadSource:
    """Plan one rank's load.

    Args:
        wanted: the destinations.
        strict: whether a wanted tensor that is not stored is an error; else it is reported.
        per_rank: what becomes of per-rank values that another number of ranks saved.
        agreeing: names of those that are the same on all ranks that saved them, which are read
            as if they were replicated.

    Raises ``StateMismatchError`` of kind ``missing_key``, ``shape_mismatch``, ``dtype_mismatch``,
    ``type_mismatch`` or ``world_size_mismatch``, naming the tensor, and ``DamagedCheckpointError``
    for chunks that do not cover what is wanted.
    """
    parts = LoadParts()
    missing: list[str] = []
    skipped: list[str] = []
    lists: list[tuple[str, tuple[torch.Tensor, ...]]] = []
    for value in plan_together(wanted, manifest, parts):
        stored = manifest.tensors.get(value.fqn)
        by_rank = manifest.per_rank_tensors.get(value.fqn)
        if stored is None and by_rank is not None:
            if manifest.world_size == world_size:
                stored = by_rank.get(rank)
            elif value.fqn in agreeing:
                stored = by_rank[min(by_rank)]
            else:
                if per_rank == "error":
                    raise _other_world(value, manifest.world_size, world_size)
                if per_rank == "skip":
                    skipped.append(value.fqn)
                    continue
                lists.append((value.fqn, _read_all(by_rank, parts)))
                continue
        if stored is None:
            _refuse_missing(value, manifest, strict, rank)
            missing.append(value.fqn)
            continue
        _check_fit(value, stored)
        parts.add(stored, value.boxes, first=len(parts.destinations))
        parts.destinations.extend(value.tensors)
    return LoadSource(
        columns=parts.columns(),
        tensors=tuple(parts.destinations),
        lists=tuple(lists),
        missing=tuple(missing),
        skipped=tuple(skipped),
    )


def plan_boxes(stored: StoredTensor, boxes: Sequence[Box]) -> LoadColumns:
    """Read ``boxes`` of one stored tensor into as many destinations, in their order."""
    parts = LoadParts()
    parts.add(stored, boxes, first=0)
    return parts.columns()


def unexpected_keys(manifest: Manifest, wanted: Collection[str]) -> tuple[str, ...]:
    """What is stored and not among ``wanted``, in the order of the manifest."""
    names = wanted if isinstance(wanted, (set, frozenset, dict)) else set(wanted)
    return tuple(name for name in stored_names(manifest) if name not in names)


def stored_names(manifest: Manifest) -> dict[str, None]:
    """The names of all values, in the order of the manifest."""
    return dict.fromkeys(
        [
            *manifest.tensors,
            *manifest.per_rank_tensors,
            *manifest.objects,
            *manifest.per_rank_objects,
        ]
    )


def _read_all(by_rank: Mapping[int, StoredTensor], parts: LoadParts) -> tuple[torch.Tensor, ...]:
    """New tensors for every saving rank's value."""
    tensors = []
    for _, stored in sorted(by_rank.items()):
        tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        tensors.append(tensor)
        if tensor.numel():
            whole = Box(offsets=(0,) * len(stored.shape), sizes=stored.shape)
            parts.add(stored, (whole,), first=len(parts.destinations))
            parts.destinations.append(tensor)
    return tuple(tensors)


def _refuse_missing(value: TensorValue, manifest: Manifest, strict: bool, rank: int) -> None:
    """An object in its place is an error always, nothing at all only if ``strict``."""
    if value.fqn in manifest.objects or value.fqn in manifest.per_rank_objects:
        raise StateMismatchError(
            "the checkpoint holds an object under this key, the destination is a tensor",
            kind="type_mismatch",
            tensor=value.fqn,
            hint="make the destination what was saved, or leave the key out",
        )
    if strict:
        of_others = value.fqn in manifest.per_rank_tensors
        raise missing_key(value, stored_names(manifest), rank=rank, for_this_rank=of_others)


def _check_fit(value: TensorValue, stored: StoredTensor) -> None:
    if tuple(value.shape) != tuple(stored.shape):
        raise StateMismatchError(
            f"the destination has shape {list(value.shape)}, the checkpoint {list(stored.shape)}",
            kind="shape_mismatch",
            tensor=value.fqn,
            hint="build the model as it was saved",
        )
    if value.dtype != stored.dtype:
        raise StateMismatchError(
            f"the destination is {value.dtype}, the checkpoint {stored.dtype}",
            kind="dtype_mismatch",
            tensor=value.fqn,
            hint="load into a tensor of the stored dtype and cast it afterwards",
        )


def _other_world(value: TensorValue, saved: int, now: int) -> StateMismatchError:
    return StateMismatchError(
        f"{saved} ranks saved a value each, and {now} are loading",
        kind="world_size_mismatch",
        tensor=value.fqn,
        hint='load with per_rank="skip" or per_rank="list", or on as many ranks',
    )
