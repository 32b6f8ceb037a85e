"""Is a checkpoint whole? Every byte read and compared with its digest, in bounded memory.

Belongs here: what is read, and in which pieces. Does not belong here: reading and digests
(``random_access``, the reader), and which checkpoint is looked at (``latest``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dcp_engine.errors import UsageError
from dcp_engine.loader.random_access import Checkpoint, LazyTensor

__all__ = ["VERIFY_LEVELS", "VerifyLevel", "VerifyReport", "verify_checkpoint"]

VerifyLevel = Literal["manifest", "full"]
VERIFY_LEVELS = ("manifest", "full")
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """A checkpoint that is what was written, as far as it was looked at."""

    checkpoint: str
    save_id: str
    committed_at: float
    """Seconds since 1970, by the clock of the host that committed."""
    world_size: int
    bytes_read: int
    """Of tensors, objects and extra files; 0 where only the manifest was looked at."""


def verify_checkpoint(
    checkpoint: Checkpoint, place: str | os.PathLike[str], level: VerifyLevel
) -> VerifyReport:
    """Look at the open ``checkpoint``.

    Args:
        place: what it was opened by.
        level: ``"manifest"``: that the manifest is whole and every chunk it names lies in a file
            it names; ``"full"``: also that the files hold what the manifest names and nothing
            else, and every byte that a load can read.
    Raises:
        DamagedCheckpointError: naming file and tensor.
    """
    if level not in VERIFY_LEVELS:
        raise UsageError(f"verify is {level!r}", hint="it is 'manifest' or 'full'")
    manifest = checkpoint.manifest
    manifest.validate()
    read = sum(_read_all(checkpoint)) if level == "full" else 0
    return VerifyReport(
        checkpoint=os.fspath(place),
        save_id=manifest.save_id,
        committed_at=manifest.time,
        world_size=manifest.world_size,
        bytes_read=read,
    )


def _read_all(checkpoint: Checkpoint) -> Iterator[int]:
    """Read everything once; the bytes of each piece."""
    yield checkpoint.verify_files(max_bytes=_PIECE_BYTES)
    own = [checkpoint.per_rank(name) for name in checkpoint.per_rank_names]
    for value in (*checkpoint.values(), *(v for by_rank in own for v in by_rank.values())):
        if isinstance(value, LazyTensor):
            yield from _read_tensor(value, [slice(0, size) for size in value.shape])


def _read_tensor(tensor: LazyTensor, box: list[slice]) -> Iterator[int]:
    """Read a box of it, halved along its first dimension with more than one row until it is small
    enough to be held."""
    nbytes = tensor.dtype.itemsize
    for extent in box:
        nbytes *= extent.stop - extent.start
    dim = next((d for d, extent in enumerate(box) if extent.stop - extent.start > 1), None)
    if nbytes <= _PIECE_BYTES or dim is None:
        yield tensor[tuple(box)].nbytes
        return
    extent = box[dim]
    rows = extent.stop - extent.start
    step = max(1, rows * _PIECE_BYTES // nbytes)
    for begin in range(extent.start, extent.stop, step):
        part = slice(begin, min(begin + step, extent.stop))
        yield from _read_tensor(tensor, [*box[:dim], part, *box[dim + 1 :]])
