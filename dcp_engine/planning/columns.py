"""Plans as columns: one numpy array per attribute, one row per tensor or chunk.

Belongs here: the frozen column classes that ``planning`` takes and returns, and their conversion
to and from compressed bytes. Does not belong here: decisions (the modules beside this one) and
items (``planning.items``).

Dimensions are padded: offsets with 0, sizes and shapes with 1, up to the widest tensor of the
table (``D`` columns); ``ndims`` says how many count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dcp_engine.format.manifest import TensorSection, encode_tensor_section

__all__ = [
    "NO_ALIAS",
    "NO_OWNER",
    "UNDECIDED_ALIAS",
    "Chunks",
    "GlobalPlan",
    "LoadColumns",
    "LocalPlan",
    "ObjectTable",
    "PlacedChunks",
    "PlannedFiles",
    "RankAssignment",
    "TensorTable",
]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

NO_ALIAS = -1
"""The tensor has storage of its own."""
UNDECIDED_ALIAS = -2
"""This rank holds no elements of the tensor, so it cannot tell."""
NO_OWNER = -1
"""The row is shared by all ranks (not ``PerRank``)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorTable:
    """K tensors."""

    names: tuple[str, ...]
    kinds: U8
    """(K,) ``EntryKind``."""
    dtypes: U8
    """(K,) codes of ``format.dtypes``."""
    ndims: U8
    """(K,)"""
    shapes: I64
    """(K, D) global shapes, padded with 1."""
    owners: I32
    """(K,) the rank a PER_RANK row belongs to, else ``NO_OWNER``. A name may stand in several
    PER_RANK rows, one per rank."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectTable:
    """Values that are not tensors, by name."""

    names: tuple[str, ...]
    kinds: U8
    """(O,) ``EntryKind``: REPLICATED or PER_RANK."""
    owners: I32
    """(O,) the rank that writes it (in a global plan), or ``NO_OWNER`` (in a local plan)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunks:
    """C boxes of tensors."""

    tensor: I32
    """(C,) row of the tensor table."""
    offsets: I64
    """(C, D)"""
    sizes: I64
    """(C, D)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalPlan:
    """What one rank has to offer. Row ``i`` of ``chunks`` is the i-th local tensor of the rank's
    source list, which stays on the rank."""

    tensors: TensorTable
    chunks: Chunks
    aliases: I32
    """(K,) row of the tensor whose storage this one shares exactly, ``NO_ALIAS``, or
    ``UNDECIDED_ALIAS``."""
    objects: ObjectTable
    containers: bytes
    """The nesting of the state dict, encoded by ``format.nesting``; merged by the global plan."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedFiles:
    """F data files, known before a byte is written."""

    rank: I32
    """(F,) who writes it."""
    number: I32
    """(F,) the file's number within its rank: rank00003-01.safetensors is rank 3, number 1."""
    data_bytes: I64
    """(F,) bytes of tensor data planned (objects that are not inline come behind them)."""
    chunks: I64
    """(F,) how many chunks lie in it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedChunks:
    """C chunks with their place. Sorted by tensor row, then by offsets."""

    tensor: I32
    offsets: I64
    sizes: I64
    file: I32
    """(C,) row of ``PlannedFiles``."""
    start: I64
    """(C,) byte position behind the begin of the file's data section (behind the header)."""
    nbytes: I64
    source: I32 | None = None
    """(C,) row of the writing rank's ``LocalPlan.chunks`` that the box is (a part) of; None in a
    plan that is not to be assigned any more."""
    order: I64 | None = None
    """(C,) rows of the chunks, as they lie in the files one behind the other; None as ``source``
    is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GlobalPlan:
    """Who writes what where, on all ranks."""

    world_size: int
    tensors: TensorTable
    aliases: I32
    """(K,) row of the tensor under which the data is stored, or ``NO_ALIAS``."""
    chunks: PlacedChunks
    files: PlannedFiles
    objects: ObjectTable
    containers: bytes

    @cached_property
    def tensor_section(self) -> TensorSection:
        """The part of a manifest that the plan fixes, encoded once for all saves that use it."""
        tensors, chunks = self.tensors, self.chunks
        return encode_tensor_section(
            names=tensors.names,
            dtypes=tensors.dtypes,
            ndims=tensors.ndims,
            shapes=tensors.shapes,
            owners=tensors.owners,
            aliases=self.aliases,
            chunk_tensor=chunks.tensor,
            chunk_offsets=chunks.offsets,
            chunk_sizes=chunks.sizes,
            chunk_file=chunks.file,
            chunk_start=chunks.start,
        )

    def without_chunks(self) -> GlobalPlan:
        """What later saves need of this plan: the encoded section instead of the chunks, 10 to 20
        bytes for each instead of 60."""
        nothing, rows = np.zeros(0, np.int32), np.zeros((0, self.tensors.shapes.shape[1]), np.int64)
        kept = replace(
            self,
            chunks=PlacedChunks(
                tensor=nothing,
                offsets=rows,
                sizes=rows,
                file=nothing,
                start=rows[:, 0],
                nbytes=rows[:, 0],
            ),
        )
        kept.__dict__["tensor_section"] = self.tensor_section  # where cached_property looks
        return kept


@dataclass(frozen=True, kw_only=True, eq=False)
class RankAssignment:
    """One rank's part of a global plan: what it writes, in file order (by file, then start).

    All it names is resolved against the rank's own local plan: ``source`` is the row of the local
    plan's chunks, ``within`` where the written box begins inside that local tensor.
    """

    source: I32
    """(C,)"""
    within: I64
    """(C, D) offset of the written box inside the source tensor."""
    offsets: I64
    """(C, D) offset of the written box in the global tensor."""
    sizes: I64
    """(C, D)"""
    file: I32
    """(C,) the file's number within the rank."""
    start: I64
    nbytes: I64
    file_data_bytes: I64
    """(f,) bytes of tensor data per file of this rank."""
    objects: tuple[str, ...]
    """Names of the objects this rank writes, in order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadColumns:
    """What one rank reads: R overlaps of a stored chunk and a wanted box, sorted by file, then by
    position. Row ``i`` copies box ``within[i] : within[i] + lengths[i]`` of the stored chunk into
    box ``dest_within[i] : ...`` of destination tensor ``dest[i]`` (a list that stays with the
    caller)."""

    names: tuple[str, ...]
    """Fully qualified names of the stored tensors."""
    tensor: I32
    """(R,) row of ``names``."""
    ndims: U8
    """(R,)"""
    itemsize: I64
    """(R,) bytes per element."""
    file: I32
    """(R,) row of the manifest's data files."""
    chunk_start: I64
    """(R,) where the stored chunk begins, behind the begin of the file's data section."""
    chunk_offsets: I64
    """(R, D) where the stored chunk lies in the global tensor."""
    chunk_sizes: I64
    """(R, D) shape of the stored chunk."""
    within: I64
    """(R, D)"""
    lengths: I64
    """(R, D)"""
    dest: I32
    """(R,)"""
    dest_within: I64
    """(R, D)"""
    flat: Bool | None = None
    """(R,) rows that read a range of the chunk's elements, whatever its shape, into a tensor of
    one dimension: only the first column of ``within``, ``lengths`` and ``dest_within`` counts,
    and positions are row-major. ``chunk_sizes`` is the chunk's own shape. None: there are none."""
