"""What lies on the medium, looked at without the code under test.

Belongs here: the interface, and the one for directories. Does not belong here: any check.
"""

from __future__ import annotations

import abc
import os
from pathlib import Path

__all__ = ["DirectoryMedium", "Medium"]


class Medium(abc.ABC):
    """The bytes of one place, reached by another way than through the backend under test: by
    ``os`` for a directory, by the client library for a bucket, by SQL for a database.

    Names are those of the ``ByteStore``, relative to its root. Called from one thread at a time.
    """

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """The content of ``name``, or ``FileNotFoundError``."""

    @abc.abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Put ``data`` under ``name``, over what is there, with the directories that it needs."""

    @abc.abstractmethod
    def names(self) -> set[str]:
        """Everything that lies there and takes room: files, also unfinished and temporary ones.
        Directories do not count. Empty if the place does not exist."""

    def snapshot(self) -> dict[str, bytes]:
        """Every name with its content."""
        return {name: self.read(name) for name in self.names()}


class DirectoryMedium(Medium):
    """A directory of the local file system."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def names(self) -> set[str]:
        files = (path for path in self._root.rglob("*") if not path.is_dir())
        return {path.relative_to(self._root).as_posix() for path in files}
