"""Manifests made by hand, for the tests of the format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dcp_engine.format.digest import xxh3_128_hex
from dcp_engine.format.dtypes import code_of
from dcp_engine.format.manifest import (
    NO_OWNER,
    DataFile,
    DigestFile,
    ExtraFile,
    StoredObject,
    TensorSection,
    encode_manifest,
    encode_tensor_section,
)
from dcp_engine.format.nesting import encode_nesting

SAVE_ID = "0123456789abcdef" * 2
Chunk = tuple[tuple[int, ...], tuple[int, ...], int, int]
"""Offsets, sizes, file, start."""


@dataclass(kw_only=True)
class Row:
    """A row of the tensors' section."""

    name: str
    shape: tuple[int, ...]
    chunks: Sequence[Chunk] = ()
    dtype: torch.dtype = torch.float32
    owner: int = NO_OWNER
    alias: int = -1


def section(rows: Sequence[Row]) -> TensorSection:
    """Encode ``rows``."""
    width = max([len(row.shape) for row in rows], default=0)
    chunks = [(i, chunk) for i, row in enumerate(rows) for chunk in row.chunks]

    def padded(values: Sequence[tuple[int, ...]], fill: int) -> Any:
        full = [(*value, *[fill] * (width - len(value))) for value in values]
        return np.array(full, np.int64).reshape(len(full), width)

    return encode_tensor_section(
        names=[row.name for row in rows],
        dtypes=np.array([code_of(row.dtype) for row in rows], np.uint8),
        ndims=np.array([len(row.shape) for row in rows], np.uint8),
        shapes=padded([row.shape for row in rows], 1),
        owners=np.array([row.owner for row in rows], np.int32),
        aliases=np.array([row.alias for row in rows], np.int32),
        chunk_tensor=np.array([i for i, _ in chunks], np.int32),
        chunk_offsets=padded([chunk[0] for _, chunk in chunks], 0),
        chunk_sizes=padded([chunk[1] for _, chunk in chunks], 1),
        chunk_file=np.array([chunk[2] for _, chunk in chunks], np.int32),
        chunk_start=np.array([chunk[3] for _, chunk in chunks], np.int64),
    )


def files(*sizes: int, rank: int | None = None) -> list[DataFile]:
    """One data file a rank (or all of ``rank``), each with so many bytes of data."""
    return [
        DataFile(
            rank=i if rank is None else rank,
            number=0 if rank is None else i,
            data_start=4096,
            size=4096 + size,
        )
        for i, size in enumerate(sizes)
    ]


@dataclass(kw_only=True)
class Content:
    """Arguments of ``encode_manifest``, with defaults that are small and valid."""

    rows: Sequence[Row] = ()
    data_files: Sequence[DataFile] = ()
    objects: Sequence[StoredObject] = ()
    extra_files: Sequence[ExtraFile] = ()
    nesting: bytes | None = None
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 2
    token: str | None = None
    rank: int | None = None
    save_id: str = SAVE_ID
    block_size: int = 65536
    time: float = 1763683200.5

    def encode(self) -> bytes:
        """The manifest."""
        ranks = sorted({file.rank for file in self.data_files})
        return encode_manifest(
            save_id=self.save_id,
            world_size=self.world_size,
            time=self.time,
            writers={"dcp_engine": "0.1", "torch": "2.13"},
            user_metadata=self.user_metadata,
            block_size=self.block_size,
            data_files=self.data_files,
            digest_files=[DigestFile(rank=r, size=100 + r, xxh3_128="ab" * 16) for r in ranks],
            extra_files=self.extra_files,
            tensors=section(self.rows),
            objects=self.objects,
            nesting=encode_nesting({}, {}) if self.nesting is None else self.nesting,
            token=self.token,
            rank=self.rank,
        )


def full_content() -> Content:
    """A manifest with one of everything, over two ranks."""
    return Content(
        rows=[
            Row(
                name="model.weight",
                shape=(4, 6),
                chunks=[((0, 0), (2, 6), 0, 0), ((2, 0), (2, 6), 1, 0)],
            ),
            Row(name="model.bias", shape=(6,), chunks=[((0,), (6,), 0, 48)], dtype=torch.bfloat16),
            Row(name="model.tied", shape=(4, 6), alias=0),
            Row(name="step", shape=(), chunks=[((), (), 1, 48)], dtype=torch.int64),
            Row(name="empty", shape=(0, 3)),
            Row(name="rng", shape=(8,), chunks=[((0,), (8,), 0, 60)], dtype=torch.uint8, owner=0),
            Row(name="rng", shape=(4,), chunks=[((0,), (4,), 1, 56)], dtype=torch.uint8, owner=1),
        ],
        data_files=files(100, 90),
        objects=[
            StoredObject(name="lr", pickled=False, inline=b"\x01N"),
            StoredObject(name="big", pickled=True, file=0, start=68, nbytes=32),
            StoredObject(name="seed", pickled=False, inline=b"\x01T", owner=0),
            StoredObject(name="seed", pickled=False, file=1, start=60, nbytes=30, owner=1),
        ],
        extra_files=[ExtraFile(name="extra/config.json", size=7, xxh3_128="cd" * 16)],
        nesting=encode_nesting(
            {
                "model.weight": ("model", "weight"),
                "model.bias": ("model", "bias"),
                "model.tied": ("model", "tied"),
                "step": ("step",),
            },
            {("model",): "dict"},
        ),
        user_metadata={"run": "größe", "list": [1, 2.5, None, True, {"a": []}]},
    )


def sign(body: bytes) -> bytes:
    """Put the right digest behind a manifest without its last field and brace."""
    return body + f',"manifest_xxh3_128":"{xxh3_128_hex(body)}"}}\n'.encode()


def body_of(manifest: bytes) -> bytes:
    """What the digest of a manifest covers."""
    return manifest[: manifest.rindex(b',"manifest_xxh3_128"')]


def edit(manifest: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Change a manifest's JSON and sign it again, as an attacker would."""
    fields = json.loads(manifest)
    del fields["manifest_xxh3_128"]
    change(fields)
    return sign(json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()[:-1])
