"""A checkpoint as a read-only mapping of names, without a process group.

Belongs here: handles that read and verify what they are asked for, when they are asked. Does not
belong here: what an index means (``slicing``) and reading bytes (the reader).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from dcp_engine.closing import Closing
from dcp_engine.error_context import located
from dcp_engine.errors import StagingError, StorageError, UsageError
from dcp_engine.format.manifest import Manifest, StoredObject, StoredTensor
from dcp_engine.format.object_codec import decode_object
from dcp_engine.format.stored import StoredChunks
from dcp_engine.loader.slicing import Selection, select
from dcp_engine.loader.stepped import positions_apart, read_portions
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.planning.load_plan import plan_boxes
from dcp_engine.state.adapters.memory import fill

__all__ = ["Checkpoint", "LazyObject", "LazyTensor"]

_MAX_GAP = 64 << 10
"""Between two positions of an index with a step fewer bytes than this, or than a block, are read
with them: that is faster than a read for each."""
_HELD_BYTES = 32 << 20
"""Memory beside the result of an index with steps; two blocks, if that is more."""


class LazyTensor:
    """A stored tensor. Nothing is read before it is indexed."""

    def __init__(self, checkpoint: Checkpoint, stored: StoredTensor) -> None:
        self._checkpoint = checkpoint
        self._stored = stored

    @property
    def name(self) -> str:
        """Fully qualified name."""
        return self._stored.name

    @property
    def shape(self) -> torch.Size:
        """Global shape."""
        return torch.Size(self._stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self._stored.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read ``tensor[index]``: integers, slices and ``...``. Only the blocks it touches are
        read, and every one is verified. Returns an ordinary CPU tensor.

        Raises:
            ConflictError: kind ``superseded``: the checkpoint was replaced.
            DamagedCheckpointError: what is stored is not what was written.
            StagingError: there is no memory for it.
        """
        return self._checkpoint._read(self._stored, select(self.shape, index, name=self.name))

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"


class LazyObject:
    """A stored value that is not a tensor. Nothing is read or decoded before ``load``."""

    def __init__(self, checkpoint: Checkpoint, stored: StoredObject) -> None:
        self._checkpoint = checkpoint
        self._stored = stored

    @property
    def name(self) -> str:
        """Fully qualified name."""
        return self._stored.name

    def load(self, *, allow_pickle: bool = False) -> object:
        """The value. ``allow_pickle`` executes what only a pickle can restore: for checkpoints
        you trust."""
        return self._checkpoint._load_object(self._stored, allow_pickle)

    def encoded(self) -> bytes:
        """The stored bytes, verified and not decoded."""
        return self._checkpoint._read_object(self._stored)

    def __repr__(self) -> str:
        return f"LazyObject({self.name!r})"


class Checkpoint(Closing, Mapping[str, LazyTensor | LazyObject]):
    """An open checkpoint, at the save that was committed when it was opened.

    Maps the names of shared values; ``per_rank`` gives those that every rank has its own of.
    A context manager. Safe to use from one thread at a time.
    """

    def __init__(self, reader: ColumnarReader, checkpoint_id: str | os.PathLike[str]) -> None:
        self._reader = reader
        try:
            with located(checkpoint=checkpoint_id, rank=0):
                self._manifest, record = reader.open_checkpoint(checkpoint_id)
        except BaseException:
            reader.close_checkpoint()
            raise
        self.save_id = record.save_id
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        """The manifest, as format version 1 describes it."""
        return self._manifest

    def __getitem__(self, name: str) -> LazyTensor | LazyObject:
        if (tensor := self._manifest.tensors.get(name)) is not None:
            return LazyTensor(self, tensor)
        if (stored := self._manifest.objects.get(name)) is not None:
            return LazyObject(self, stored)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._manifest.tensors
        yield from self._manifest.objects

    def __len__(self) -> int:
        return len(self._manifest.tensors) + len(self._manifest.objects)

    def __contains__(self, name: object) -> bool:
        return name in self._manifest.tensors or name in self._manifest.objects

    @property
    def per_rank_names(self) -> tuple[str, ...]:
        """Names of the values that every rank has its own of."""
        manifest = self._manifest
        return tuple(dict.fromkeys([*manifest.per_rank_tensors, *manifest.per_rank_objects]))

    def per_rank(self, name: str) -> dict[int, LazyTensor | LazyObject]:
        """Each rank's value under ``name``, by rank."""
        found: dict[int, LazyTensor | LazyObject] = {
            rank: LazyTensor(self, tensor)
            for rank, tensor in self._manifest.per_rank_tensors.get(name, {}).items()
        }
        for rank, stored in self._manifest.per_rank_objects.get(name, {}).items():
            found[rank] = LazyObject(self, stored)
        if not found:
            raise KeyError(name)
        return dict(sorted(found.items()))

    @property
    def extra_names(self) -> tuple[str, ...]:
        """Names of the caller's extra files."""
        return tuple(entry.name.removeprefix("extra/") for entry in self._manifest.extra_files)

    def read_extra(self, name: str) -> bytes:
        """The content of an extra file, verified."""
        self._refuse_if_closed()
        return self._reader.read_extra(self._manifest, name)

    def verify_files(self, *, max_bytes: int) -> int:
        """Compare all files with the manifest, but for the bytes of tensors, ``max_bytes`` at a
        time. Returns the bytes of objects and extra files.

        Raises ``DamagedCheckpointError``.
        """
        self._refuse_if_closed()
        with located(checkpoint=self._reader.checkpoint, rank=0):
            return self._reader.verify_files(self._manifest, max_bytes=max_bytes)

    def mmap(self, name: str) -> torch.Tensor:
        """A copy-on-write map of a tensor that is stored as one chunk in a local file. Its bytes
        are NOT verified; the file's size is.

        Raises:
            StorageError: kind ``unsupported_storage``: it is in several chunks, or not local.
        """
        self._refuse_if_closed()
        stored = self._manifest.tensors[name]
        chunks = stored.chunks
        if not stored.info.itemsize or not chunks.nbytes.sum():
            return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        path = None
        if len(chunks.start) == 1:
            path = self._reader.local_data_file(self._manifest, int(chunks.file[0]))
        if path is None:
            raise StorageError(
                "the tensor is stored in several chunks"
                if len(chunks.start) != 1
                else "the storage is not a local file system",
                kind="unsupported_storage",
                checkpoint=self._reader.checkpoint,
                tensor=name,
                hint="slice it instead: ckpt[name][...]",
            )
        file = self._manifest.data_files[int(chunks.file[0])]
        mapped = np.memmap(
            path,
            dtype=np.uint8,
            mode="c",
            offset=file.data_start + int(chunks.start[0]),
            shape=(int(chunks.nbytes[0]),),
        )
        return torch.frombuffer(mapped, dtype=stored.dtype).reshape(stored.shape)

    def close(self) -> None:
        """Release files and connections. May be called twice."""
        self._closed = True
        self._reader.close_checkpoint()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError("the checkpoint is closed", checkpoint=self._reader.checkpoint)

    def _read(self, stored: StoredTensor, selection: Selection) -> torch.Tensor:
        self._refuse_if_closed()
        chunks = stored.chunks  # checked before memory is taken
        result = self._memory(stored, selection.counts)
        if result.numel():
            self._fill(result, stored, selection, chunks)
        return result.reshape(selection.shape)

    def _memory(self, stored: StoredTensor, shape: tuple[int, ...]) -> torch.Tensor:
        try:
            return torch.empty(shape, dtype=stored.dtype, device="cpu")
        except RuntimeError as error:
            for row in np.unique(stored.chunks.file).tolist():
                self._reader.local_data_file(self._manifest, row)  # is it as long as it is said?
            raise StagingError(
                f"there is no memory for {math.prod(shape)} elements: {error}",
                checkpoint=self._reader.checkpoint,
                tensor=stored.name,
                hint="read a part of it",
            ) from error

    def _fill(
        self,
        result: torch.Tensor,
        stored: StoredTensor,
        selection: Selection,
        chunks: StoredChunks,
    ) -> None:
        itemsize, block = stored.info.itemsize, self._manifest.block_size
        largest = chunks.sizes[int(chunks.nbytes.argmax())].tolist()
        apart = positions_apart(selection, largest, itemsize=itemsize, max_gap=max(_MAX_GAP, block))
        scratch = None
        for portion in read_portions(
            selection, apart, itemsize=itemsize, max_bytes=max(_HELD_BYTES, 2 * block)
        ):
            part = result[portion.where]
            held, size = part, math.prod(portion.held)
            if portion.held != tuple(part.shape):
                if scratch is None or scratch.numel() < size:
                    scratch = self._memory(stored, (size,))
                held = scratch[:size].view(portion.held)
            boxes, places = zip(*portion.boxes(), strict=True)
            tensors = [held[place] for place in places]
            with located(checkpoint=self._reader.checkpoint, rank=0):
                self._reader.read_columns(
                    self._manifest, plan_boxes(stored, boxes), tensors, _go_on
                )
            if held is not part:
                fill(part, held[portion.kept])

    def _read_object(self, stored: StoredObject) -> bytes:
        self._refuse_if_closed()
        return self._reader.read_object(self._manifest, stored)

    def _load_object(self, stored: StoredObject, allow_pickle: bool) -> object:
        return decode_object(
            self._read_object(stored),
            stored.pickled,
            fqn=stored.name,
            checkpoint=self._reader.checkpoint,
            allow_pickle=allow_pickle,
        )


def _go_on() -> None:
    """There is no other rank that could fail."""
