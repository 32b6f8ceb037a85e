"""The column face of the engine's own writers and readers.

A ``ColumnarWriter`` is a ``StorageWriter`` that can also take a whole save as columns, without an
object per item; savers use that face when the planner is the default one too, and DCP's life
cycle otherwise. Belongs here: the two interfaces and the data classes in their signatures. Does
not belong here: any implementation (``storage_backends.sharded_writer``, ``sharded_reader``).
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from dcp_engine.coordination.interface import RunIdentity
from dcp_engine.format.manifest import Manifest, StoredObject
from dcp_engine.format.object_codec import EncodedObject
from dcp_engine.planning.columns import GlobalPlan, LoadColumns, RankAssignment
from dcp_engine.storage import Check, StorageReader, StorageWriter

__all__ = [
    "ColumnarReader",
    "ColumnarWriter",
    "CommitRecord",
    "FileReport",
    "ObjectReport",
    "RankReport",
    "SaveTicket",
]


@dataclass(frozen=True, kw_only=True)
class SaveTicket:
    """What every rank knows about the save it takes part in."""

    save_id: str
    """32 hexadecimal digits, the same on all ranks."""
    rank: int
    world_size: int
    coordinator_rank: int
    identity: RunIdentity
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    """Written by the coordinator, in the same transaction."""
    user_metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON values, kept in the manifest."""
    use_collectives: bool = True
    """False: every rank commits a manifest of its own."""
    keep_replaced: bool = False
    """Leave the data of the checkpoint that this one replaces, for ``prune``."""
    by_worker: bool = False
    """Another process than the one that asked for the save writes it."""
    beside_training: bool = False
    """Training goes on in the process that writes: take one thread, not all processors."""
    nice: int = 0
    """Beside training: by how much the nice value of a thread that writes is to be raised, where
    that thread is the save's own."""


class FileReport(msgspec.Struct, frozen=True, array_like=True):
    """A data file as it was written."""

    number: int
    data_start: int
    """Bytes before the data section: 8 and the length of the header."""
    size: int
    """Bytes of the whole file."""


class ObjectReport(msgspec.Struct, frozen=True, array_like=True):
    """An object as it was stored: inline, or in a data file of the rank."""

    name: str
    pickled: bool
    inline: bytes | None
    number: int
    start: int
    nbytes: int


class RankReport(msgspec.Struct, frozen=True, array_like=True):
    """What one rank wrote, some tens of bytes on the wire (``msgspec.msgpack``)."""

    rank: int
    files: list[FileReport]
    chunks: int
    """How many chunks were written."""
    digests_size: int
    digests_xxh3: str
    """xxh3-128 of the rank's digest file, hexadecimal."""
    objects: list[ObjectReport]


class CommitRecord(msgspec.Struct, frozen=True, array_like=True):
    """A committed checkpoint, as the coordinator publishes it."""

    save_id: str
    manifest_size: int
    manifest_xxh3: str


class ColumnarWriter(StorageWriter):
    """Order of calls: ``observe`` (coordinator), ``begin_save`` (every rank), ``write_columns``
    (every rank), ``commit_columns`` (coordinator; every rank without collectives),
    ``remove_replaced`` (coordinator), ``end_save`` (every rank); or, after a failure,
    ``abort_save`` on every rank."""

    @property
    @abc.abstractmethod
    def takes_columns(self) -> bool:
        """False where a subclass overrides a method of DCP's life cycle, which then has to run."""

    @property
    @abc.abstractmethod
    def checkpoint(self) -> str:
        """The checkpoint's id, for messages."""

    @property
    def bytes_written(self) -> int:
        """Bytes of the present save that were handed to the medium so far; asked by any thread."""
        return 0

    @abc.abstractmethod
    def announce(self, ticket: SaveTicket) -> None:
        """Before ``set_up_storage_writer``, where DCP's life cycle runs: what it has no argument
        for. Holds until the save ends."""

    @abc.abstractmethod
    def observe(self, checkpoint_id: str | os.PathLike[str] | None) -> str | None:
        """The save id of the checkpoint that is there now, or None."""

    @abc.abstractmethod
    def begin_save(self, checkpoint_id: str | os.PathLike[str] | None, ticket: SaveTicket) -> None:
        """Create the data directory; on the coordinator also ``owner.json``."""

    @abc.abstractmethod
    def write_columns(
        self,
        assignment: RankAssignment,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        tensors: Sequence[torch.Tensor],
        objects: Mapping[str, EncodedObject],
        inline: frozenset[str],
        check: Check,
    ) -> RankReport:
        """Write and sync this rank's part; ``names[i]`` is the fully qualified name,
        ``shapes[i]`` the global shape of that tensor, and ``tensors[i]`` the memory of local
        chunk ``i`` (the rows that ``assignment.source`` refers to); objects named in
        ``inline`` go into the report if they are small enough. ``check`` is called between slices
        of at most 64 MiB. The result has been compared with the assignment."""

    @abc.abstractmethod
    def commit_columns(
        self, plan: GlobalPlan, reports: Sequence[RankReport], observed: str | None
    ) -> CommitRecord:
        """Compare the reports with the plan, write the manifest, make it the checkpoint.

        Raises ``ConflictError(kind="conflict")`` when the checkpoint there is no longer
        ``observed``; any error other than ``kind="commit_in_doubt"`` means that the manifest was
        provably not replaced."""

    @abc.abstractmethod
    def manifest_source(self, record: CommitRecord) -> Callable[[], Manifest]:
        """What reads the manifest of ``record`` from the medium, on any rank, at any later time.
        It raises ``ConflictError(kind="superseded")`` if another save has been committed since."""

    def find_commit(
        self, checkpoint_id: str | os.PathLike[str] | None, save_id: str
    ) -> CommitRecord | None:
        """The record of save ``save_id`` if that is the checkpoint there now, for whoever does not
        know whether it was committed; durably, when this returns."""
        return None

    @abc.abstractmethod
    def remove_replaced(self) -> None:
        """After the commit: remove the data of the replaced checkpoint and provably dead
        orphans. Failing to is not a failed save; it is logged."""

    @abc.abstractmethod
    def end_save(self) -> None:
        """The save succeeded; release what it held."""

    @abc.abstractmethod
    def abort_save(self) -> None:
        """The save failed and is provably not committed: remove what this rank wrote."""

    @abc.abstractmethod
    def leave_in_doubt(self) -> None:
        """Whether the save was committed is not known: delete nothing, and leave word (on the
        coordinator, whose attempt to commit is over) that what the manifest does not name may be
        removed by the next save."""


class ColumnarReader(StorageReader):
    """Order of calls: ``expect_ranks``, ``open_checkpoint`` (or ``adopt_manifest``),
    ``read_columns`` and ``read_object`` any number of times, ``close_checkpoint``."""

    def expect_ranks(self, world_size: int) -> None:
        """How many ranks the next loads are of, in either face; 1 until somebody says so. A reader
        whose medium is seen by one process only refuses to open it for several
        (``unsupported_storage``)."""
        return None

    @property
    @abc.abstractmethod
    def takes_columns(self) -> bool:
        """False where a subclass overrides a method of DCP's life cycle, which then has to run."""

    @property
    @abc.abstractmethod
    def checkpoint(self) -> str:
        """The checkpoint's id, for messages."""

    @abc.abstractmethod
    def open_checkpoint(
        self,
        checkpoint_id: str | os.PathLike[str] | None,
        expected: CommitRecord | None = None,
    ) -> tuple[Manifest, CommitRecord]:
        """Read and check the manifest. With ``expected``, another one than that is
        ``ConflictError(kind="superseded")``."""

    @abc.abstractmethod
    def manifest_bytes(self, record: CommitRecord) -> bytes:
        """What ``open_checkpoint`` read, as it lies on the medium now, for a rank that does not
        see it. Another one than ``record`` is ``ConflictError(kind="superseded")``."""

    @abc.abstractmethod
    def adopt_manifest(
        self, checkpoint_id: str | os.PathLike[str] | None, data: bytes, record: CommitRecord
    ) -> Manifest:
        """Open the checkpoint by the ``manifest_bytes`` of another rank. Bytes that are not those
        of ``record`` are ``DamagedCheckpointError(kind="digest_mismatch")``."""

    @abc.abstractmethod
    def read_columns(
        self,
        manifest: Manifest,
        plan: LoadColumns,
        tensors: Sequence[torch.Tensor],
        check: Check,
    ) -> int:
        """Fill the destinations; every block of bytes is verified before it counts. Returns the
        number of bytes read."""

    @abc.abstractmethod
    def local_data_file(self, manifest: Manifest, row: int) -> str | None:
        """The local path of data file ``row`` of the manifest, its size checked; None where the
        medium is not a local file system."""

    @abc.abstractmethod
    def read_object(self, manifest: Manifest, stored: StoredObject) -> bytes:
        """The encoded bytes of an object, verified."""

    @abc.abstractmethod
    def block_digests(self, manifest: Manifest, file: int, start: int) -> bytes:
        """The digests of the blocks of the chunk at byte ``start`` of data file ``file`` (a row of
        the manifest's), as they are stored: chunks of one size are equal if these are."""

    @abc.abstractmethod
    def read_extra(self, manifest: Manifest, name: str) -> bytes:
        """The content of one of the caller's extra files, verified."""

    @abc.abstractmethod
    def verify_files(self, manifest: Manifest, *, max_bytes: int) -> int:
        """Compare all files with the manifest but for the bytes of tensors: every header lists what
        the manifest has in that file and nothing else, and digest files, objects and extra files
        are what was written.

        Args:
            max_bytes: how much is read at a time.

        Returns the bytes of objects and extra files. Raises ``DamagedCheckpointError``, naming the
        file.
        """

    @abc.abstractmethod
    def close_checkpoint(self) -> None:
        """Release descriptors."""
