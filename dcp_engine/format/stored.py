"""What a manifest says is stored: typed, frozen, checked when it is asked for.

Belongs here: the classes that the rest of the engine reads a checkpoint through, and their
checks. Does not belong here: the bytes of a manifest (``manifest_codec``, ``tensor_section``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from dcp_engine.errors import CheckpointError, DamagedCheckpointError
from dcp_engine.format.dtypes import DTypeInfo
from dcp_engine.format.names import data_directory, data_file_name, digest_file_name
from dcp_engine.format.nesting import Nesting
from dcp_engine.format.tiling import check_tiling

__all__ = [
    "MAX_BYTES",
    "MAX_CHUNK_CELLS",
    "MAX_NDIM",
    "NO_OWNER",
    "DataFile",
    "DigestFile",
    "ExtraFile",
    "Manifest",
    "StoredChunks",
    "StoredObject",
    "StoredTensor",
]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]

MAX_BYTES = 1 << 60
"""No size and no position in a checkpoint is above this, so that sums fit into int64."""
MAX_NDIM = 64
"""torch's own limit."""
MAX_CHUNK_CELLS = 1 << 25
"""Chunks of one tensor times its dimensions: bounds what one table may expand to (256 MiB)."""
NO_OWNER = -1
"""The value is shared by all ranks (not ``PerRank``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """A safetensors file of one rank."""

    rank: int
    number: int
    data_start: int
    """Bytes before the data section: 8 and the length of the header."""
    size: int
    """Bytes of the whole file."""

    @property
    def name(self) -> str:
        """Name in the data directory."""
        return data_file_name(self.rank, self.number)


@dataclass(frozen=True, kw_only=True, slots=True)
class DigestFile:
    """The digests of one rank's data files."""

    rank: int
    size: int
    xxh3_128: str

    @property
    def name(self) -> str:
        """Name in the data directory."""
        return digest_file_name(self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtraFile:
    """A file of the caller's. ``name`` is relative to the data directory: ``extra/...``."""

    name: str
    size: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredChunks:
    """The n boxes of one tensor and where their bytes are. Arrays are read-only."""

    offsets: I64
    """(n, ndim) in elements of the global tensor."""
    sizes: I64
    """(n, ndim)"""
    file: I32
    """(n,) row of the manifest's data files."""
    start: I64
    """(n,) byte position behind the begin of the file's data section."""
    nbytes: I64
    """(n,)"""


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """A value that is not a tensor: inline, or bytes of a data file."""

    name: str
    pickled: bool
    """Whether ``torch.save`` encoded it; else it is in the tagged encoding."""
    inline: bytes | None = None
    """The encoded bytes, or None: then they are where ``file``, ``start`` and ``nbytes`` say."""
    file: int = -1
    start: int = 0
    nbytes: int = 0
    owner: int = NO_OWNER
    """The rank of a per-rank value, else ``NO_OWNER``."""


class StoredTensor(msgspec.Struct, frozen=True, kw_only=True, eq=False, dict=True):
    """A tensor as it is stored. A struct: there may be very many."""

    name: str
    info: DTypeInfo
    shape: tuple[int, ...]
    owner: int
    """The rank of a per-rank value, else ``NO_OWNER``."""
    alias_of: str | None
    """The name under which the data is stored, if this is an alias."""
    load_chunks: Callable[[], StoredChunks]
    """Decodes and checks the table: in bounds of tensor and files."""
    must_tile: bool = True
    """Whether it has to be checked that the chunks tile the shape: not where they do so by
    construction, and not in one rank's manifest of several."""
    shares_bytes: bool = False
    """Some chunks are another tensor's too, though this is no alias as a whole. Only in a merged
    manifest, where tensors were tied on some ranks and not on others."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.info.dtype

    @cached_property
    def chunks(self) -> StoredChunks:
        """The chunks, for an alias those of the tensor it stands for.

        Raises ``DamagedCheckpointError`` (``manifest_invalid``, ``chunk_out_of_bounds``,
        ``chunks_overlap``) if they are not boxes inside the tensor and inside their files that
        tile its shape.
        """
        try:
            chunks = self.load_chunks()
        except CheckpointError as error:
            raise error.with_context(tensor=self.name) from error.__cause__
        if self.must_tile:
            check_tiling(self.shape, chunks.offsets, chunks.sizes, tensor=self.name)
        return chunks


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """One checkpoint. Mappings are read-only and make their values when asked."""

    version: str
    save_id: str
    world_size: int
    time: float
    """Seconds since 1970, by the clock of the host that committed."""
    writers: Mapping[str, str]
    """Versions of what wrote it, by name."""
    user_metadata: Mapping[str, object]
    block_size: int
    """Bytes under one digest."""
    token: str | None
    """What the ranks of a collective-free save share; None for an ordinary save."""
    rank: int | None
    """Whose manifest this is, if it is one of a collective-free save not yet merged."""
    tensors: Mapping[str, StoredTensor]
    per_rank_tensors: Mapping[str, Mapping[int, StoredTensor]]
    objects: Mapping[str, StoredObject]
    per_rank_objects: Mapping[str, Mapping[int, StoredObject]]
    nesting: Nesting
    data_files: Sequence[DataFile]
    digest_files: Sequence[DigestFile]
    extra_files: Sequence[ExtraFile]
    parts: Sequence[Manifest] = ()
    """The manifests that this one was merged from, by rank. Their data files stand one behind the
    other in this one's."""

    @property
    def data_directory(self) -> str:
        """Name of the directory with this checkpoint's files."""
        return data_directory(self.save_id)

    def digest_file(self, rank: int) -> DigestFile:
        """The digest file of ``rank``. Raises ``DamagedCheckpointError`` if there is none."""
        entry = self._digest_files_by_rank.get(rank)
        if entry is None:
            raise DamagedCheckpointError(f"the manifest names no digest file for rank {rank}")
        return entry

    @cached_property
    def _digest_files_by_rank(self) -> Mapping[int, DigestFile]:
        return {entry.rank: entry for entry in self.digest_files}

    def all_tensors(self) -> Iterable[StoredTensor]:
        """Every tensor, per-rank ones too."""
        yield from self.tensors.values()
        for by_rank in self.per_rank_tensors.values():
            yield from by_rank.values()

    def all_objects(self) -> Iterable[StoredObject]:
        """Every object, per-rank ones too."""
        yield from self.objects.values()
        for by_rank in self.per_rank_objects.values():
            yield from by_rank.values()

    def validate(self, names: Iterable[str] | None = None) -> None:
        """Check the chunks of the tensors and objects called ``names`` (None: of all): each table
        by itself, and that no two chunks claim the same bytes of a file.

        Raises ``DamagedCheckpointError``; see ``StoredTensor.chunks``.
        """
        tensors, objects = self._select(names)
        labels: list[str] = []
        counts: list[int] = []
        columns: list[tuple[npt.NDArray[np.int32], I64, I64]] = []
        for tensor in tensors:
            chunks = tensor.chunks
            if tensor.alias_of is None and not tensor.shares_bytes:
                labels.append(tensor.name)
                counts.append(len(chunks.start))
                columns.append((chunks.file, chunks.start, chunks.nbytes))
        stored = [entry for entry in objects if entry.inline is None]
        labels.extend(entry.name for entry in stored)
        counts.extend(1 for _ in stored)
        columns.append(
            (
                np.array([entry.file for entry in stored], np.int32),
                np.array([entry.start for entry in stored], np.int64),
                np.array([entry.nbytes for entry in stored], np.int64),
            )
        )
        file, start, nbytes = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        owner = np.repeat(np.arange(len(labels)), counts)
        self._check_bytes(file, start, nbytes, owner, labels)

    def _select(
        self, names: Iterable[str] | None
    ) -> tuple[Iterable[StoredTensor], Iterable[StoredObject]]:
        if names is None:
            return self.all_tensors(), self.all_objects()
        tensors: list[StoredTensor] = []
        objects: list[StoredObject] = []
        for name in names:
            if name in self.tensors:
                tensors.append(self.tensors[name])
            if name in self.objects:
                objects.append(self.objects[name])
            tensors.extend(self.per_rank_tensors.get(name, {}).values())
            objects.extend(self.per_rank_objects.get(name, {}).values())
        return tensors, objects

    def _check_bytes(
        self, file: I32, start: I64, nbytes: I64, owner: npt.NDArray[np.intp], labels: list[str]
    ) -> None:
        # Chunks without bytes claim none; left in, they could stand between two that overlap.
        some = nbytes > 0
        file, start, nbytes, owner = file[some], start[some], nbytes[some], owner[some]
        order = np.lexsort((start, file))
        file, start, nbytes, owner = file[order], start[order], nbytes[order], owner[order]
        clash = (file[1:] == file[:-1]) & (start[1:] < start[:-1] + nbytes[:-1])
        if clash.any():
            first = int(np.argmax(clash))
            one, two = labels[int(owner[first])], labels[int(owner[first + 1])]
            raise DamagedCheckpointError(
                f"chunks of {one!r} and {two!r} claim the same bytes",
                kind="chunks_overlap",
                file=self.data_files[int(file[first])].name,
                tensor=one,
            )
