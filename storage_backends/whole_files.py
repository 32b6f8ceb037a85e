"""Are all files of a checkpoint what the manifest says, and is there nothing else in them?

Belongs here: headers, digest files, objects and extra files, for a full verification. Does not
belong here: the bytes of tensors, which are verified as they are read (``read_files``).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from dcp_engine.errors import DamagedCheckpointError
from dcp_engine.format.dtypes import stored_shape
from dcp_engine.format.manifest import ExtraFile, Manifest, StoredObject
from dcp_engine.format.shard_file import Stored
from dcp_engine.storage import Check, ReadRange
from storage_backends.checkpoint_files import CheckpointFiles
from storage_backends.read_batch import Wanted
from storage_backends.read_files import read_wanted
from storage_backends.tensor_bytes import memory_of
from storage_backends.wanted_rows import checked

__all__ = ["check_extra", "compare_headers", "object_part"]

I64 = npt.NDArray[np.int64]


def compare_headers(files: CheckpointFiles) -> None:
    """Raise unless every data file's header lists what the manifest has in that file, no more and
    no less, and every digest file is what was written.

    In a save without collectives ranks may write the same chunk. Each rank's own manifest names
    what is in its files; the merged one only what counts.
    """
    manifest = files.manifest
    if files.verify_digests:
        for entry in manifest.digest_files:
            files.table(entry.rank)
    before = 0
    for part in manifest.parts or (manifest,):
        _compare(files, part, before)
        before += len(part.data_files)


def _compare(files: CheckpointFiles, manifest: Manifest, before: int) -> None:
    """``manifest``'s data files begin at row ``before`` of those of ``files``."""
    known: dict[Stored, int] = {}
    names: list[str] = []
    columns: list[tuple[I64, I64, I64, I64]] = []
    for tensor in manifest.all_tensors():
        if tensor.alias_of is not None:
            continue
        chunks = tensor.chunks
        shapes = map(tuple, chunks.sizes.tolist())
        kinds = [known.setdefault(stored_shape(tensor.info, s), len(known)) for s in shapes]
        file = chunks.file.astype(np.int64)
        columns.append((file, chunks.start, chunks.nbytes, np.array(kinds, np.int64)))
        names += [tensor.name] * len(kinds)
    for stored in manifest.all_objects():
        if stored.inline is None:
            code = known.setdefault(("U8", (stored.nbytes,)), len(known))
            row = np.array([stored.file, stored.start, stored.nbytes, code], np.int64)
            columns.append((row[:1], row[1:2], row[2:3], row[3:]))
            names.append(stored.name)
    nothing = np.empty(0, np.int64)
    columns.append((nothing, nothing, nothing, nothing))
    file, start, nbytes, kind = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((start, file))
    order = order[nbytes[order] > 0]  # what has no bytes need not be listed
    # Where tensors were tied on some ranks only, two names have one chunk.
    places = np.stack([file[order], start[order], nbytes[order], kind[order]], axis=1)
    order = order[np.append(True, (places[1:] != places[:-1]).any(axis=1))[: len(order)]]
    bounds = np.searchsorted(file[order], np.arange(len(manifest.data_files) + 1)).tolist()
    stored_kinds = list(known)
    for number, (begin, end) in enumerate(pairwise(bounds)):
        rows = order[begin:end]
        here, which = np.unique(kind[rows], return_inverse=True)
        files.compare_entries(
            before + number,
            start[rows],
            nbytes[rows],
            [stored_kinds[row] for row in here.tolist()],
            which,
            [names[row] for row in rows.tolist()],
        )
        _refuse_others(files, before + number, start[rows])


def _refuse_others(files: CheckpointFiles, row: int, starts: I64) -> None:
    """Raise if the header of data file ``row`` lists more than what is at ``starts``."""
    header = files.header(row)
    others = np.flatnonzero(~np.isin(header.begins, starts))
    if not len(others):
        return
    at = int(others[0])
    found = next(entry for entry, kind in header.stored.items() if kind == header.kinds[at])
    raise DamagedCheckpointError(
        f"the file's header has {found[0]} of shape {list(found[1])} at byte "
        f"{header.begins[at]}, and the manifest nothing",
        kind="header_mismatch",
        checkpoint=files.store.url,
        file=files.path(files.manifest.data_files[row].name),
        hint="take another checkpoint",
    )


def object_part(
    files: CheckpointFiles, stored: StoredObject, begin: int, data: torch.Tensor, check: Check
) -> None:
    """Read bytes of an object in a data file, from ``begin`` on, into ``data``, (n,) uint8; the
    blocks that they lie in are verified."""
    wanted = Wanted(
        name=stored.name,
        file=stored.file,
        start=stored.start,
        nbytes=stored.nbytes,
        sizes=(stored.nbytes,),
        within=(begin,),
        lengths=(data.numel(),),
        tensor=data,
        digests=None,
        run=begin,
    )
    read_wanted(files, checked(files, [wanted]), threads=1, check=check)


def check_extra(files: CheckpointFiles, entry: ExtraFile, memory: torch.Tensor) -> None:
    """Raise unless an extra file is what was written. ``memory``, (n,) uint8, is what may be
    used."""
    path, view = files.path(entry.name), memory_of(memory)
    digest = xxhash.xxh3_128()
    with files.reading(entry.name):
        files.compare_size(entry.name, entry.size)
        for begin in range(0, entry.size, view.nbytes):
            part = view[: entry.size - begin]
            files.store.read(path, [ReadRange(begin, part)])
            digest.update(part)
        if digest.hexdigest() != entry.xxh3_128:
            raise DamagedCheckpointError(
                "the extra file is not what was written", kind="digest_mismatch"
            )
