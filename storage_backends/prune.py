"""Removes what saves left behind that nobody finished.

Belongs here: which data directories are old and unnamed, and their removal on demand. Does not
belong here: the clean-up that every save does by itself (``rank_save``), which needs proof that
the owner is dead; here age is the proof, and the caller answers for it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from dcp_engine.errors import CheckpointError
from dcp_engine.format.names import (
    MANIFEST_NAME,
    parse_data_directory,
    parse_rank_manifest_name,
)
from dcp_engine.registry import BackendRegistry
from dcp_engine.storage import ByteStore, StoredFile
from storage_backends.filesystem import backend as filesystem
from storage_backends.garbage import DataDirectory, data_directories
from storage_backends.os_errors import storage_error
from storage_backends.present import present_save_id
from storage_backends.replaced_data import remove_directory_files

__all__ = ["KeptDirectory", "PruneReport", "RemovedDirectory", "prune", "prune_checkpoint"]

DAY = 86400.0
"""Seconds: the default age from which an unfinished save counts as abandoned."""


@dataclass(frozen=True, kw_only=True)
class RemovedDirectory:
    """A data directory that was removed. ``name`` is relative to what was pruned."""

    name: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class KeptDirectory:
    """A data directory that stays, and why: ``committed``, ``too young``, ``age unknown``,
    ``unreadable`` (it may not be looked into), or ``unreadable manifest`` (of the checkpoint it
    lies in)."""

    name: str
    nbytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What ``prune`` did."""

    removed: tuple[RemovedDirectory, ...]
    kept: tuple[KeptDirectory, ...]

    @property
    def bytes_removed(self) -> int:
        """Size of what was removed."""
        return sum(entry.nbytes for entry in self.removed)


def prune(
    root: str | os.PathLike[str] | ByteStore,
    *,
    older_than: float | timedelta = DAY,
    dry_run: bool = False,
) -> PruneReport:
    """Remove abandoned data from all checkpoints below ``root`` (which may be one itself).

    Args:
        root: a path or URL, or an open store.
        older_than: how long nothing in a data directory may have changed, by the medium's own
            clock, seconds or timedelta. A save that takes longer between two writes is taken
            for dead.
        dry_run: only say what would be removed.

    Only directories called ``data-<32 hexadecimal digits>`` are ever touched, and none that a
    manifest beside it names; with them go the manifests of saves without collectives that name
    them, where ``manifest.json`` has taken their place. What this process may not look into stays
    as it is. Raises ``StorageError``.
    """
    if isinstance(root, ByteStore):
        return _prune(root, "", older_than, dry_run)
    with BackendRegistry({"file": filesystem}).open_store(root) as store:
        return _prune(store, "", older_than, dry_run)


def prune_checkpoint(
    store: ByteStore, *, older_than: float | timedelta = DAY, dry_run: bool = False
) -> PruneReport:
    """``prune`` for one checkpoint: directories below its own are not looked at."""
    return _prune(store, "data-", older_than, dry_run)


def _prune(
    store: ByteStore, prefix: str, older_than: float | timedelta, dry_run: bool
) -> PruneReport:
    seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
    removed: list[RemovedDirectory] = []
    kept: list[KeptDirectory] = []
    try:
        for place, files in sorted(_by_checkpoint(store.list(prefix)).items()):
            if not (directories := data_directories(files)):
                continue
            committed, hidden = _committed(store, place)
            reasons = {d.name: _reason_to_keep(d, committed, seconds) for d in directories}
            if not dry_run and None in reasons.values():
                # A save that was killed may have renamed its manifest and not made that durable:
                # what it replaced is garbage only when no power failure can bring it back.
                store.sync_directory(place.rstrip("/"))
            for directory in directories:
                name = f"{place}{directory.name}"
                reason = reasons[directory.name]
                if reason is not None:
                    kept.append(KeptDirectory(name=name, nbytes=directory.nbytes, reason=reason))
                    continue
                if not dry_run:
                    store.delete(hidden.get(directory.save_id, []))
                    remove_directory_files(store, [f"{place}{f.name}" for f in directory.files])
                removed.append(RemovedDirectory(name=name, nbytes=directory.nbytes))
    except CheckpointError:
        raise
    except OSError as error:
        raise storage_error(error, "prune", checkpoint=store.url, file=prefix) from error
    return PruneReport(removed=tuple(removed), kept=tuple(kept))


def _by_checkpoint(files: Iterable[StoredFile]) -> dict[str, list[StoredFile]]:
    """Files below data directories, by the checkpoint these lie in (``"step-1/"``, or ``""``),
    with names relative to it."""
    found: dict[str, list[StoredFile]] = defaultdict(list)
    for file in files:
        parts = file.name.split("/")
        for depth, part in enumerate(parts[:-1]):
            if parse_data_directory(part) is not None:
                place = "".join(f"{parent}/" for parent in parts[:depth])
                found[place].append(replace(file, name="/".join(parts[depth:])))
                break
    return found


def _committed(
    store: ByteStore, place: str
) -> tuple[frozenset[str] | None, Mapping[str, Sequence[str]]]:
    """The save ids that manifests in ``place`` name (None if one cannot be read); and of manifests
    that count for nothing, because ``manifest.json`` is there, the names by save id."""
    of_ranks: dict[str, list[str]] = defaultdict(list)
    for file in store.list(f"{place}manifest-rank"):
        if parse_rank_manifest_name(file.name.removeprefix(place)) is not None:
            save_id = present_save_id(store, file.name)
            if save_id is not None:
                of_ranks[save_id].append(file.name)
    whole = present_save_id(store, f"{place}{MANIFEST_NAME}")
    named = frozenset(of_ranks if whole is None else [whole])
    if any(save_id.startswith("unreadable:") for save_id in named):
        return None, {}
    return named, {} if whole is None else of_ranks


def _reason_to_keep(
    directory: DataDirectory, committed: frozenset[str] | None, seconds: float
) -> str | None:
    if committed is None:
        return "unreadable manifest"
    if directory.save_id in committed:
        return "committed"
    if directory.unreadable:
        return "unreadable"
    age = directory.age
    if age is None:
        return "age unknown"
    return "too young" if age < seconds else None
