"""What happens to a disk: the words in which a record is written.

Belongs here: the operations of a file system that decide what is left after a crash, and the
record of a run. Does not belong here: how they are observed (``recorder``), and what a crash makes
of them (``persistence``).

Files and directories are numbered (``node``) in the order in which the recorder met them, because
names move: a rename changes an entry of a directory, never the bytes of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import xxhash

__all__ = [
    "ROOT",
    "Create",
    "Image",
    "Link",
    "MakeDirectory",
    "Mark",
    "Operation",
    "Record",
    "RemoveDirectory",
    "Rename",
    "Step",
    "Sync",
    "SyncAll",
    "SyncFailed",
    "Truncate",
    "Unlink",
    "Write",
]

ROOT = 0
"""The node of the directory that is recorded."""


@dataclass(frozen=True)
class Create:
    """A new, empty file ``node`` gets the name ``name`` in ``directory``."""

    directory: int
    name: str
    node: int


@dataclass(frozen=True)
class MakeDirectory:
    """A new directory ``node``."""

    directory: int
    name: str
    node: int


@dataclass(frozen=True)
class Link:
    """``node`` gets one more name."""

    directory: int
    name: str
    node: int


@dataclass(frozen=True)
class Unlink:
    """A file loses a name."""

    directory: int
    name: str


@dataclass(frozen=True)
class RemoveDirectory:
    """An empty directory goes."""

    directory: int
    name: str


@dataclass(frozen=True)
class Rename:
    """An entry moves, and takes the place of what was there; both at once."""

    directory: int
    name: str
    to_directory: int
    to_name: str


@dataclass(frozen=True)
class Write:
    """Bytes of a file."""

    node: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncate:
    """A file gets shorter, or longer by zeros."""

    node: int
    size: int


@dataclass(frozen=True)
class Sync:
    """``fsync`` of a file (its bytes and size), or of a directory (its entries)."""

    node: int


@dataclass(frozen=True)
class SyncFailed:
    """``fsync`` said that it failed. What was not durable may be lost for good: the system marks
    the pages clean, and no later ``fsync`` writes them."""

    node: int


@dataclass(frozen=True)
class SyncAll:
    """``sync`` of everything."""


@dataclass(frozen=True)
class Mark:
    """Nothing for the disk: where the program is. ``returned:new`` is the save that wrote "new"
    having returned."""

    text: str


Operation = (
    Create
    | MakeDirectory
    | Link
    | Unlink
    | RemoveDirectory
    | Rename
    | Write
    | Truncate
    | Sync
    | SyncFailed
    | SyncAll
    | Mark
)


@dataclass(frozen=True)
class Step:
    """An operation, and who did it (the name of a thread)."""

    operation: Operation
    actor: str


@dataclass(frozen=True)
class Image:
    """A directory tree: files by path, and directories that are there, relative to the root."""

    files: Mapping[str, bytes]
    directories: frozenset[str] = frozenset()

    @property
    def digest(self) -> bytes:
        """16 bytes that tell it from other images."""
        hasher = xxhash.xxh3_128()
        for path, data in sorted(self.files.items()):
            hasher.update(f"{path}\0{len(data)}\0".encode())
            hasher.update(data)
        for path in sorted(self.directories):
            hasher.update(f"{path}/\0".encode())
        return hasher.digest()


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run: what was on the disk before, durably, and what was done to it."""

    files: Mapping[int, bytes]
    """Content of the files that were there, by node."""
    entries: Mapping[tuple[int, str], int]
    """What was in the directories: (directory, name) to node."""
    steps: tuple[Step, ...] = field(repr=False)

    def durable_points(self) -> int:
        """How many of its steps make something durable."""
        return sum(isinstance(step.operation, Sync | SyncAll) for step in self.steps)

    def marks(self) -> Iterator[tuple[int, str]]:
        """Positions and texts of the marks."""
        for at, step in enumerate(self.steps):
            if isinstance(step.operation, Mark):
                yield at, step.operation.text
