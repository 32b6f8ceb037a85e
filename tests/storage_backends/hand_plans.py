"""Plans made by hand, so that these tests depend on no planner: one rank or several, each tensor
cut into the boxes that a test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dcp_engine.coordination.interface import RunIdentity
from dcp_engine.format.dtypes import code_of
from dcp_engine.format.manifest import Manifest
from dcp_engine.format.nesting import encode_nesting
from dcp_engine.format.object_codec import EncodedObject, encode_object
from dcp_engine.native_storage import ColumnarReader, ColumnarWriter, CommitRecord, SaveTicket
from dcp_engine.planning.columns import (
    GlobalPlan,
    LoadColumns,
    ObjectTable,
    PlacedChunks,
    PlannedFiles,
    RankAssignment,
    TensorTable,
)
from dcp_engine.state.values import EntryKind


def _alignment(nbytes: int) -> int:
    """The largest power of two, at most a page, that divides the size."""
    return min(nbytes & -nbytes or 4096, 4096)


Box = tuple[tuple[int, ...], tuple[int, ...]]

IDENTITY = RunIdentity(run_id="run", restart_count=1, group="", host="host", boot_id="boot", pid=1)


def no_check() -> None:
    return None


@dataclass
class Shard:
    """One written box: of which tensor, where, by whom, from what memory."""

    name: str
    offsets: tuple[int, ...]
    tensor: torch.Tensor
    rank: int = 0


@dataclass
class HandPlan:
    """What each rank writes: shards of ``shapes`` (by name) and objects (name to rank, value)."""

    shapes: Mapping[str, tuple[int, ...]]
    shards: Sequence[Shard]
    objects: Mapping[str, tuple[int, object]] = field(default_factory=dict)
    world_size: int = 1

    def _files(self) -> list[int]:
        return sorted({shard.rank for shard in self.shards})

    def placed(self) -> list[tuple[Shard, int]]:
        """Shards with their start, by rank and alignment of their size."""
        ends = dict.fromkeys(self._files(), 0)
        result = []
        for shard in sorted(self.shards, key=lambda s: (s.rank, -_alignment(s.tensor.nbytes))):
            result.append((shard, ends[shard.rank]))
            ends[shard.rank] += shard.tensor.numel() * shard.tensor.element_size()
        return result

    @property
    def width(self) -> int:
        return max([1, *(len(shape) for shape in self.shapes.values())])

    def _pad(self, rows: Sequence[tuple[int, ...]], fill: int) -> np.ndarray:
        padded = np.full((len(rows), self.width), fill, np.int64)
        for at, row in enumerate(rows):
            padded[at, : len(row)] = row
        return padded

    def sources(self, rank: int) -> list[Shard]:
        return [shard for shard in self.shards if shard.rank == rank]

    def global_plan(self) -> GlobalPlan:
        names = list(self.shapes)
        dtypes = {shard.name: shard.tensor.dtype for shard in self.shards}
        files = self._files()
        rows = [entry for entry in self.placed() if entry[0].tensor.numel()]
        row_of = {name: row for row, name in enumerate(names)}
        rows.sort(key=lambda entry: (row_of[entry[0].name], entry[0].offsets))
        sizes = [s.tensor.numel() * s.tensor.element_size() for s, _ in rows]
        totals = [
            sum(n for n, (s, _) in zip(sizes, rows, strict=True) if s.rank == rank)
            for rank in files
        ]
        return GlobalPlan(
            world_size=self.world_size,
            tensors=TensorTable(
                names=tuple(names),
                kinds=np.full(len(names), EntryKind.SHARDED, np.uint8),
                dtypes=np.array([code_of(dtypes.get(n, torch.float32)) for n in names], np.uint8),
                ndims=np.array([len(self.shapes[n]) for n in names], np.uint8),
                shapes=self._pad([self.shapes[n] for n in names], 1),
                owners=np.full(len(names), -1, np.int32),
            ),
            aliases=np.full(len(names), -1, np.int32),
            chunks=PlacedChunks(
                tensor=np.array([row_of[s.name] for s, _ in rows], np.int32),
                offsets=self._pad([s.offsets for s, _ in rows], 0),
                sizes=self._pad([tuple(s.tensor.shape) for s, _ in rows], 1),
                file=np.array([files.index(s.rank) for s, _ in rows], np.int32),
                start=np.array([start for _, start in rows], np.int64),
                nbytes=np.array(sizes, np.int64),
            ),
            files=PlannedFiles(
                rank=np.array(files, np.int32),
                number=np.zeros(len(files), np.int32),
                data_bytes=np.array(totals, np.int64),
                chunks=np.array([sum(s.rank == r for s, _ in rows) for r in files], np.int64),
            ),
            objects=ObjectTable(
                names=tuple(self.objects),
                kinds=np.full(len(self.objects), EntryKind.REPLICATED, np.uint8),
                owners=np.array([rank for rank, _ in self.objects.values()], np.int32),
            ),
            containers=encode_nesting({}, {}),
        )

    def assignment(self, rank: int) -> RankAssignment:
        sources = self.sources(rank)
        source_of = {id(shard): row for row, shard in enumerate(sources)}
        rows = [(s, start) for s, start in self.placed() if s.rank == rank and s.tensor.numel()]
        sizes = [s.tensor.numel() * s.tensor.element_size() for s, _ in rows]
        return RankAssignment(
            source=np.array([source_of[id(s)] for s, _ in rows], np.int32),
            within=self._pad([(0,) * len(s.offsets) for s, _ in rows], 0),
            offsets=self._pad([s.offsets for s, _ in rows], 0),
            sizes=self._pad([tuple(s.tensor.shape) for s, _ in rows], 1),
            file=np.zeros(len(rows), np.int32),
            start=np.array([start for _, start in rows], np.int64),
            nbytes=np.array(sizes, np.int64),
            file_data_bytes=np.array([sum(sizes)] if sources else [], np.int64),
            objects=tuple(n for n, (owner, _) in self.objects.items() if owner == rank),
        )

    def encoded(self, rank: int) -> dict[str, EncodedObject]:
        return {
            name: encode_object(value, fqn=name)
            for name, (owner, value) in self.objects.items()
            if owner == rank
        }


def whole(tensors: Mapping[str, torch.Tensor], **objects: object) -> HandPlan:
    """One rank that writes whole tensors."""
    return HandPlan(
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        shards=[Shard(name, (0,) * t.ndim, t) for name, t in tensors.items()],
        objects={name: (0, value) for name, value in objects.items()},
    )


def ticket(save_id: str, rank: int = 0, world_size: int = 1, **changes: object) -> SaveTicket:
    values: dict[str, object] = {
        "save_id": save_id,
        "rank": rank,
        "world_size": world_size,
        "coordinator_rank": 0,
        "identity": IDENTITY,
    }
    return SaveTicket(**{**values, **changes})  # type: ignore[arg-type]


def write(writer: ColumnarWriter, plan: HandPlan, rank: int) -> object:
    sources = plan.sources(rank)
    return writer.write_columns(
        plan.assignment(rank),
        [s.name for s in sources],
        [plan.shapes[s.name] for s in sources],
        [s.tensor for s in sources],
        plan.encoded(rank),
        frozenset(plan.objects),
        no_check,
    )


def save(
    writers: Sequence[ColumnarWriter], plan: HandPlan, save_id: str, **changes: object
) -> CommitRecord:
    """A whole save: ``writers[rank]`` on each rank, rank 0 the coordinator."""
    observed = writers[0].observe(None)
    reports = []
    for rank, writer in enumerate(writers):
        writer.begin_save(None, ticket(save_id, rank, len(writers), **changes))
        reports.append(write(writer, plan, rank))
    record = writers[0].commit_columns(plan.global_plan(), reports, observed)  # type: ignore[arg-type]
    writers[0].remove_replaced()
    for writer in writers:
        writer.end_save()
    return record


def load_columns(
    manifest: Manifest, wanted: Sequence[tuple[str, tuple[int, ...], torch.Tensor]]
) -> LoadColumns:
    """Every overlap of a stored chunk with a wanted box (name, offsets, tensor)."""
    names = sorted({name for name, _, _ in wanted})
    name_rows = {name: row for row, name in enumerate(names)}
    rows: list[dict[str, object]] = []
    for dest, (name, offsets, tensor) in enumerate(wanted):
        chunks = manifest.tensors[name].chunks
        for at in range(len(chunks.start)):
            begin, size = chunks.offsets[at].tolist(), chunks.sizes[at].tolist()
            low = [max(b, o) for b, o in zip(begin, offsets, strict=True)]
            high = [
                min(b + s, o + n)
                for b, s, o, n in zip(begin, size, offsets, tensor.shape, strict=True)
            ]
            if all(h > w for h, w in zip(high, low, strict=True)):
                rows.append(
                    {
                        "tensor": name_rows[name],
                        "ndim": tensor.ndim,
                        "itemsize": tensor.element_size(),
                        "file": int(chunks.file[at]),
                        "start": int(chunks.start[at]),
                        "chunk_offsets": begin,
                        "chunk_sizes": size,
                        "within": [w - b for w, b in zip(low, begin, strict=True)],
                        "lengths": [h - w for h, w in zip(high, low, strict=True)],
                        "dest": dest,
                        "dest_within": [w - o for w, o in zip(low, offsets, strict=True)],
                    }
                )
    rows.sort(key=lambda row: (row["file"], row["start"]))
    width = max([1, *(tensor.ndim for _, _, tensor in wanted)])

    def column(key: str, dtype: type[np.generic]) -> np.ndarray:
        return np.array([row[key] for row in rows], dtype)

    def padded(key: str, fill: int) -> np.ndarray:
        values = np.full((len(rows), width), fill, np.int64)
        for at, row in enumerate(rows):
            values[at, : len(row[key])] = row[key]  # type: ignore[arg-type]
        return values

    return LoadColumns(
        names=tuple(names),
        tensor=column("tensor", np.int32),
        ndims=column("ndim", np.uint8),
        itemsize=column("itemsize", np.int64),
        file=column("file", np.int32),
        chunk_start=column("start", np.int64),
        chunk_offsets=padded("chunk_offsets", 0),
        chunk_sizes=padded("chunk_sizes", 1),
        within=padded("within", 0),
        lengths=padded("lengths", 1),
        dest=column("dest", np.int32),
        dest_within=padded("dest_within", 0),
    )


def load(
    reader: ColumnarReader, wanted: Sequence[tuple[str, tuple[int, ...], torch.Tensor]]
) -> int:
    manifest, _ = reader.open_checkpoint(None)
    try:
        tensors = [tensor for _, _, tensor in wanted]
        return reader.read_columns(manifest, load_columns(manifest, wanted), tensors, no_check)
    finally:
        reader.close_checkpoint()


def load_whole(reader: ColumnarReader, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything, into fresh tensors filled with something else."""
    fresh = {
        name: torch.zeros_like(t, memory_format=torch.contiguous_format) for name, t in like.items()
    }
    load(reader, [(name, (0,) * t.ndim, t) for name, t in fresh.items()])
    return fresh
