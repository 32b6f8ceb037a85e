"""The two ways to plug in storage.

``ByteStore`` moves bytes and knows nothing of checkpoints; the engine's format, commit, digests
and resharding come for free above it. ``StorageWriter`` and ``StorageReader`` are DCP's own life
cycle, for whoever wants to own the layout.

Belongs here: the interfaces and the data classes in their signatures. Does not belong here: any
medium, and the format (``storage_backends``).
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from torch.futures import Future

from dcp_engine.closing import Closing
from dcp_engine.errors import StorageError
from dcp_engine.metadata import Metadata, MetadataIndex, StorageMeta
from dcp_engine.plan import LoadPlan, SavePlan
from dcp_engine.planner import LoadPlanner, SavePlanner

__all__ = [
    "ByteStore",
    "ByteStoreFile",
    "ReadRange",
    "StorageReader",
    "StorageWriter",
    "StoredFile",
    "WriteResult",
]

Buffer = memoryview
"""A C-contiguous memoryview of bytes (format ``B``)."""


class ReadRange(msgspec.Struct, frozen=True, gc=False):
    """Bytes to read: ``buffer`` is filled from ``offset``, whole or the read fails.

    A struct: one read may have a thousand, and data classes take five times as long to make.
    """

    offset: int
    buffer: Buffer


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing: name relative to the store, size in bytes, and how long ago it was
    last changed, in seconds by the medium's own clock (None where the medium has none)."""

    name: str
    size: int
    age: float | None = None
    unreadable: bool = False
    """It is a directory, with a slash behind its name, and what lies in it is not known, since
    this process may not look."""


class ByteStoreFile(abc.ABC):
    """A file being written. Callable from several threads.

    Ends with exactly one of ``close`` (after which the content is visible under its name) and
    ``abort`` (after which nothing of it remains, as far as the medium allows).
    """

    def bypass_cache(self) -> None:
        """Said before the first ``write`` of a file that nobody is going to read soon, while others
        want memory and processors. A medium that would keep what is written in memory that the
        system shares may write past it; by default nothing changes. Writes are promised no order
        by it."""
        return

    @abc.abstractmethod
    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write ``buffers`` one behind the other from byte ``offset``, without joining them.
        When it returns, their memory is the caller's again.

        Where the store's ``random_write`` is false, ``offset`` must be where the last write
        ended. Raises ``OSError`` or ``StorageError`` unless every byte was taken.
        """

    @abc.abstractmethod
    def sync(self) -> None:
        """Return when everything written so far is on stable storage (where the store's
        ``durable_sync`` is true; else it may do nothing). Never retried after a failure."""

    @abc.abstractmethod
    def close(self) -> None:
        """Finish the file."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Give the file up. Never raises for a file that is already gone."""


class ByteStore(Closing):
    """Bytes under names below one root (a directory, a key prefix). Callable from threads.

    Names are relative, with ``/`` between parts, and never contain ``..`` or begin with ``/``.
    Errors are ``FileNotFoundError``, ``FileExistsError``, another ``OSError``, or a
    ``StorageError``.
    """

    random_write: bool
    """``ByteStoreFile.write`` takes any offset."""
    concurrent_writes: bool = True
    """Several threads that write one file are faster than one. If not, one writes it from begin to
    end."""
    atomic_replace: bool
    """``replace`` exists: one name takes over another's content at once. Else ``put`` is how a
    small object appears at once."""
    create_if_absent: bool
    """``put(if_absent=True)`` lets exactly one of several callers win."""
    replace_if_same: bool = False
    """``tag`` and ``put_over`` exist: of several callers who replace one object, one wins."""
    durable_sync: bool
    """``sync`` and ``sync_directory`` mean stable storage."""
    shared_between_processes: bool
    """What one process wrote another can read."""
    preferred_read: int = 2 << 20
    """Bytes that one call of ``read`` should ask for, so that the wait for the first one hardly
    counts. A store that says more than this default is one whose requests are slow to begin:
    readers then share out what they need evenly, in as few calls as this allows."""

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """Where this store is, without credentials; used in messages."""

    def local_path(self, name: str) -> str | None:
        """The path of ``name`` in the local file system, or None where there is none."""
        return None

    @abc.abstractmethod
    def make_directory(self, name: str) -> None:
        """Create directory ``name`` and its parents (``""`` is the root). No error if it exists.
        Does nothing where the medium has no directories."""

    @abc.abstractmethod
    def create(self, name: str, size: int | None = None) -> ByteStoreFile:
        """Begin a new file. ``size`` in bytes is a hint. Never creates a directory: a missing
        parent is a ``FileNotFoundError``, so that a rank that wakes late cannot bring a removed
        directory back."""

    @abc.abstractmethod
    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> None:
        """Store a small object whole, durably where ``durable_sync`` is true.

        With ``if_absent`` and ``create_if_absent``, a name that is there is ``FileExistsError``.
        """

    def tag(self, name: str) -> str:
        """What changes whenever the object ``name`` does. Only with ``replace_if_same``."""
        raise self._lacks("tags", name)

    def put_over(self, name: str, data: bytes, tag: str) -> None:
        """``put``, if the object is still that of ``tag``; else ``FileExistsError``. Only with
        ``replace_if_same``."""
        raise self._lacks("conditional replacement", name)

    def _lacks(self, what: str, name: str) -> StorageError:
        return StorageError(
            f"{type(self).__name__} has no {what}",
            kind="unsupported_storage",
            checkpoint=self.url,
            file=name,
        )

    @abc.abstractmethod
    def read(self, name: str, ranges: Sequence[ReadRange]) -> None:
        """Fill every range's buffer. A file that ends too early is an ``EOFError``."""

    @contextmanager
    def opened(self, name: str) -> Iterator[Callable[[Sequence[ReadRange]], None]]:
        """For several reads of one file: what ``read`` does for ``name``, as a callable. A medium
        where opening costs something opens the file once; the errors are the same, but may come
        at once."""
        yield partial(self.read, name)

    @abc.abstractmethod
    def size(self, name: str) -> int:
        """Size in bytes of ``name``, or ``FileNotFoundError``."""

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterable[StoredFile]:
        """All files whose names begin with ``prefix``, in any order. A directory that holds
        nothing is listed too, as its name with ``/`` at the end and size 0, where the medium has
        directories: ``delete`` takes that name. So is one below the root that this process
        may not read, marked ``unreadable``."""

    @abc.abstractmethod
    def replace(self, source: str, target: str) -> None:
        """Give ``source``'s content the name ``target``, at once. Only with ``atomic_replace``."""

    @abc.abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove files, and the directories below the root that become empty by it. Names that
        are not there are no error. A name that is a directory is removed if it is empty."""

    @abc.abstractmethod
    def sync_directory(self, name: str) -> None:
        """Make the entries of directory ``name`` durable (where ``durable_sync`` is true)."""

    def close(self) -> None:
        """Release connections and descriptors. May be called twice."""
        return None

    def get(self, name: str, *, limit: int | None = None) -> bytes:
        """The whole content of ``name``; over ``limit`` bytes is a ``ValueError``."""
        size = self.size(name)
        if limit is not None and size > limit:
            raise ValueError(f"{name} holds {size} bytes, more than the {limit} expected at most")
        data = bytearray(size)
        if size:
            self.read(name, [ReadRange(0, memoryview(data))])
        return bytes(data)


@dataclass(frozen=True)
class WriteResult:
    """What a writer says of one item it wrote. ``storage_data`` is the writer's own."""

    index: MetadataIndex
    size_in_bytes: int
    storage_data: Any


class StorageWriter(abc.ABC):
    """Writes one checkpoint at a time, on every rank, in DCP's order of calls.

    ``reset`` (every rank), ``set_up_storage_writer`` (every rank), ``prepare_local_plan`` (every
    rank), ``prepare_global_plan`` (coordinator), ``write_data`` (every rank), ``finish``
    (coordinator). After a failure anywhere, ``abort`` is called on every rank instead.
    """

    @abc.abstractmethod
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins; ``checkpoint_id`` is where to, or None for where the writer points."""

    @abc.abstractmethod
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn this rank's part. ``rank`` and ``use_collectives`` may come as keywords."""

    @abc.abstractmethod
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Adjust this rank's plan; usually only its ``storage_data``."""

    @abc.abstractmethod
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Adjust all ranks' plans; called on the coordinator only."""

    @abc.abstractmethod
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write every item of ``plan``, asking ``planner.resolve_data`` for its data, late."""

    @abc.abstractmethod
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata and commit. Called on the coordinator only."""

    def abort(self) -> None:
        """The save failed: remove what this rank wrote. Does nothing unless overridden."""
        return None

    def leave_in_doubt(self) -> None:
        """Whether the save was committed is not known: delete nothing, release what is held.
        Does nothing unless overridden."""
        return None

    @classmethod
    @abc.abstractmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this writer understands ``checkpoint_id``."""

    def storage_meta(self) -> StorageMeta | None:
        """What the planner may want to know of the storage."""
        return None


class StorageReader(abc.ABC):
    """Reads one checkpoint at a time, on every rank, in DCP's order of calls.

    ``reset``, ``read_metadata``, ``set_up_storage_reader``, ``prepare_local_plan`` (every rank),
    ``prepare_global_plan`` (coordinator), ``read_data`` (every rank).
    """

    @abc.abstractmethod
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins, of ``checkpoint_id`` or of where the reader points."""

    @abc.abstractmethod
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read what the checkpoint holds."""

    @abc.abstractmethod
    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Learn the metadata and this rank's part."""

    @abc.abstractmethod
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Adjust this rank's plan."""

    @abc.abstractmethod
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Adjust all ranks' plans; called on the coordinator only."""

    @abc.abstractmethod
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Carry out every item of ``plan`` through ``planner``."""

    @classmethod
    @abc.abstractmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this reader understands ``checkpoint_id``."""


Check = Callable[[], None]
"""Raises if the operation must stop (another rank failed, a deadline passed). Cheap; any thread."""
