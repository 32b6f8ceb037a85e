"""Where the digests of many chunks are, found for all chunks of a rank at once.

Belongs here: look-ups in digest tables. Does not belong here: reading the tables
(``checkpoint_files``), and comparing digests with bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dcp_engine.errors import DamagedCheckpointError
from dcp_engine.format.digest import DigestTable
from storage_backends.checkpoint_files import CheckpointFiles

__all__ = ["DigestRows", "digest_rows"]

I64 = npt.NDArray[np.int64]


class DigestRows(NamedTuple):
    """Chunk ``rows[i]`` is row ``at[i]`` of ``table``."""

    rows: npt.NDArray[np.intp]
    table: DigestTable
    at: I64


def digest_rows(
    files: CheckpointFiles, file: I64, start: I64, nbytes: I64, names: Sequence[str]
) -> Iterator[DigestRows]:
    """The rows of chunks in the digest tables, table by table.

    Args:
        file: (n,) rows of the manifest's data files.
        start, nbytes: (n,) places in their data sections.
        names: (n,) of tensors, for messages.

    Raises ``DamagedCheckpointError`` (``digest_mismatch``) for a chunk that has none.
    """
    entries = files.manifest.data_files
    ranks = np.array([entry.rank for entry in entries], np.int64)[file]
    numbers = np.array([entry.number for entry in entries], np.int64)[file]
    for rank in np.unique(ranks).tolist():
        rows = np.flatnonzero(ranks == rank)
        table = files.table(rank)
        try:
            at = table.rows(numbers[rows], start[rows])
        except DamagedCheckpointError as error:
            name = files.manifest.digest_file(rank).name
            error.with_context(checkpoint=files.store.url, file=files.path(name))
            raise
        differ = np.flatnonzero(table.nbytes[at] != nbytes[rows])
        if len(differ):
            first = int(differ[0])
            row = int(rows[first])
            raise DamagedCheckpointError(
                f"the digests are of a chunk of {int(table.nbytes[at[first]])} bytes, the "
                f"manifest has {int(nbytes[row])}",
                kind="digest_mismatch",
                checkpoint=files.store.url,
                file=files.path(entries[int(file[row])].name),
                tensor=names[row],
                hint="take another checkpoint",
            )
        yield DigestRows(rows, table, at)
