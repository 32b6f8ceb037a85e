"""One manifest out of those that the ranks of a collective-free save wrote.

Belongs here: deciding whether the set is complete, and uniting it. Nothing is decoded that is not
asked for: a tensor's chunks are put together when somebody looks at them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import structs

from dcp_engine.errors import DamagedCheckpointError, InvalidPlanError, NotFoundError
from dcp_engine.format.lazy_maps import LazyMap
from dcp_engine.format.names import rank_manifest_name
from dcp_engine.format.nesting import Nesting, merge_nestings
from dcp_engine.format.stored import Manifest, StoredChunks, StoredObject, StoredTensor

__all__ = ["merge_manifests"]

_NAMED_RANKS = 20
"""How many ranks an error lists."""

I64 = npt.NDArray[np.int64]
V = TypeVar("V")
Part = tuple[Manifest, int]
"""A manifest, and the row at which its data files begin in the merged table."""


def merge_manifests(manifests: Sequence[Manifest]) -> Manifest:
    """Unite the manifests of all ranks.

    Raises ``NotFoundError`` (``incomplete``), naming the ranks, if some are missing or carry
    another token than the others; ``DamagedCheckpointError`` (``manifest_invalid``) if ranks with
    one token contradict each other.
    """
    ordered = _check_complete(manifests)
    first = ordered[0]
    parts: list[Part] = []
    files_before = 0
    for manifest in ordered:
        parts.append((manifest, files_before))
        files_before += len(manifest.data_files)
    sources: dict[str, tuple[str, list[Part]]] = {}
    for manifest, base in parts:
        for name in manifest.tensors:
            sources.setdefault(name, (name, []))[1].append((manifest, base))
    objects = _merge_objects(parts)
    per_rank_tensors: dict[str, dict[int, StoredTensor]] = {}
    per_rank_objects: dict[str, dict[int, StoredObject]] = {}
    for manifest, base in parts:
        for name, tensors in manifest.per_rank_tensors.items():
            for rank, tensor in tensors.items():
                _add(per_rank_tensors, name, rank, _moved_tensor(tensor, base))
        for name, by_rank in manifest.per_rank_objects.items():
            for rank, entry in by_rank.items():
                _add(per_rank_objects, name, rank, _moved_object(entry, base))
    _check_names(sources, objects, per_rank_tensors, per_rank_objects)
    return Manifest(
        version=first.version,
        save_id=first.save_id,
        world_size=first.world_size,
        time=max(m.time for m in ordered),
        writers=first.writers,
        user_metadata=first.user_metadata,
        block_size=first.block_size,
        token=first.token,
        rank=None,
        tensors=LazyMap(sources, _merge_tensor),
        per_rank_tensors=MappingProxyType(per_rank_tensors),
        objects=MappingProxyType(objects),
        per_rank_objects=MappingProxyType(per_rank_objects),
        nesting=_merge_nestings(ordered),
        data_files=tuple(file for m in ordered for file in m.data_files),
        digest_files=tuple(file for m in ordered for file in m.digest_files),
        extra_files=tuple(file for m in ordered for file in m.extra_files),
        parts=tuple(ordered),
    )


def _check_complete(manifests: Sequence[Manifest]) -> list[Manifest]:
    if not manifests:
        raise NotFoundError("no rank has a manifest", kind="incomplete")
    by_rank: dict[int, Manifest] = {}
    for manifest in manifests:
        if manifest.rank is None or manifest.token is None:
            raise DamagedCheckpointError("a manifest is not one rank's of several")
        if by_rank.setdefault(manifest.rank, manifest) is not manifest:
            raise DamagedCheckpointError(
                f"rank {manifest.rank} has two manifests", file=rank_manifest_name(manifest.rank)
            )
    ordered = [by_rank[rank] for rank in sorted(by_rank)]
    first = ordered[0]
    world_size = max(m.world_size for m in ordered)
    differ = [m.rank for m in ordered if (m.token, m.save_id) != (first.token, first.save_id)]
    missing = [rank for rank in range(world_size) if rank not in by_rank]
    if missing or differ:
        what = []
        if missing:
            what.append(f"{_list(missing)} of {world_size} have no manifest")
        if differ:
            what.append(f"{_list(differ)} carry another token than rank {first.rank}")
        raise NotFoundError(
            f"the checkpoint is incomplete: {'; '.join(what)}",
            kind="incomplete",
            hint="wait until all ranks have saved, or take another checkpoint",
        )
    for manifest in ordered:
        if (manifest.world_size, manifest.block_size) != (first.world_size, first.block_size):
            _contradict(first, manifest, "world size or block size")
    return ordered


def _list(ranks: Sequence[int | None]) -> str:
    shown = ", ".join(map(str, ranks[:_NAMED_RANKS]))
    more = len(ranks) - _NAMED_RANKS
    return f"ranks {shown}" + (f" and {more} more" if more > 0 else "")


def _contradict(one: Manifest, other: Manifest, what: str, tensor: str | None = None) -> None:
    raise DamagedCheckpointError(
        f"the manifests of ranks {one.rank} and {other.rank} differ in {what}", tensor=tensor
    )


def _merge_tensor(source: tuple[str, list[Part]]) -> StoredTensor:
    name, parts = source
    first_manifest = parts[0][0]
    first = first_manifest.tensors[name]
    # Ranks that hold nothing of the tensor say nothing about whether it is tied.
    holding: list[tuple[StoredTensor, int]] = []
    for manifest, base in parts:
        tensor = manifest.tensors[name]
        if tensor.info is not first.info or tensor.shape != first.shape:
            _contradict(first_manifest, manifest, "dtype or shape", name)
        if len(tensor.chunks.start):
            holding.append((tensor, base))
    aliases = {tensor.alias_of for tensor, _ in holding}
    alias_of = next(iter(aliases)) if len(aliases) == 1 else None
    return StoredTensor(
        name=name,
        info=first.info,
        shape=first.shape,
        owner=first.owner,
        alias_of=alias_of,
        load_chunks=partial(_join_chunks, holding, first.shape),
        shares_bytes=alias_of is None and aliases > {None},
    )


def _join_chunks(
    holding: Sequence[tuple[StoredTensor, int]], shape: tuple[int, ...]
) -> StoredChunks:
    if not holding and 0 not in shape:
        raise DamagedCheckpointError(
            "ranks know of the tensor, and none of them wrote it",
            hint="without collectives rank 0 writes plain tensors, and the ranks of its mesh a "
            "DTensor; the rank that should have written this one did not have it",
        )
    ndim = len(shape)
    chunks = [tensor.chunks for tensor, _ in holding]
    files = [tensor.chunks.file + np.int32(base) for tensor, base in holding]
    nothing = np.empty(0, np.int64)
    offsets = np.concatenate([c.offsets for c in chunks] or [nothing.reshape(0, ndim)])
    sizes = np.concatenate([c.sizes for c in chunks] or [nothing.reshape(0, ndim)])
    kept = _first_of_each(offsets, sizes)
    return StoredChunks(
        offsets=offsets[kept],
        sizes=sizes[kept],
        file=np.concatenate(files or [nothing.astype(np.int32)])[kept],
        start=np.concatenate([c.start for c in chunks] or [nothing])[kept],
        nbytes=np.concatenate([c.nbytes for c in chunks] or [nothing])[kept],
    )


def _first_of_each(offsets: I64, sizes: I64) -> I64:
    """Rows of boxes without those that an earlier row repeats, in order.

    Ranks that cannot know of each other write the same box each: a tensor on a slice of a mesh
    says nothing of the other slices. The lowest rank's counts.
    """
    rows = np.concatenate([offsets, sizes], axis=1)
    if not rows.size:  # without dimensions all boxes are one
        return np.arange(min(len(rows), 1))
    return np.sort(np.unique(rows, axis=0, return_index=True)[1])


def _moved_tensor(tensor: StoredTensor, base: int) -> StoredTensor:
    return structs.replace(
        tensor,
        must_tile=True,
        load_chunks=partial(_join_chunks, [(tensor, base)], tensor.shape),
    )


def _moved_object(entry: StoredObject, base: int) -> StoredObject:
    return entry if entry.inline is not None else replace(entry, file=entry.file + base)


def _merge_objects(parts: Sequence[Part]) -> dict[str, StoredObject]:
    """Every rank stores the shared objects it has, since none knows who else has them; the lowest
    rank's counts."""
    objects: dict[str, StoredObject] = {}
    for manifest, base in parts:
        for name, entry in manifest.objects.items():
            if name not in objects:
                objects[name] = _moved_object(entry, base)
    return objects


def _add(target: dict[str, dict[int, V]], name: str, rank: int, value: V) -> None:
    if target.setdefault(name, {}).setdefault(rank, value) is not value:
        raise DamagedCheckpointError(f"two manifests hold the value of rank {rank}", tensor=name)


def _check_names(
    tensors: Collection[str],
    objects: Collection[str],
    per_rank_tensors: Collection[str],
    per_rank_objects: Collection[str],
) -> None:
    shared = set(tensors) | set(objects)
    clash = set(tensors) & set(objects) | shared & (set(per_rank_tensors) | set(per_rank_objects))
    if clash:
        raise DamagedCheckpointError(
            "the ranks' manifests disagree whether it is a tensor, an object or per rank",
            tensor=min(clash),
        )


def _merge_nestings(manifests: Sequence[Manifest]) -> Nesting:
    try:
        return Nesting(merge_nestings([m.nesting.data for m in manifests]))
    except InvalidPlanError as error:
        raise DamagedCheckpointError(error.message, tensor=error.tensor) from error
