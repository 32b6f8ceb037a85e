"""Directories, listings and renames on fsspec's file systems.

Belongs here: what differs between object stores and file servers there. Does not belong here:
content of files (``fsspec_reads``, ``fsspec_writes``), retries and errors (``fsspec_store``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

__all__ = [
    "Entry",
    "can_rename_if_absent",
    "is_directory",
    "list_objects",
    "list_tree",
    "make_directories",
    "remove_directory",
    "remove_file",
    "rename",
    "rename_if_absent",
]

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created", "timestamp")


class Entry(NamedTuple):
    """A file, or an empty directory (``path`` then ends with ``/``)."""

    path: str
    size: int
    changed: float | None
    """Seconds since the epoch, by the medium's clock."""


def _changed(info: dict[str, Any]) -> float | None:
    for name in _TIMES:
        value = info.get(name)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                continue
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


def _entry(info: dict[str, Any]) -> Entry:
    return Entry(info["name"].rstrip("/"), int(info.get("size") or 0), _changed(info))


def _inside(fs: Any, directory: str) -> list[dict[str, Any]]:
    """What lies directly in ``directory``; nothing if it is not there, or no directory."""
    try:
        found = fs.ls(directory or fs.root_marker, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        # SFTP says "Failure" for a file.
        if is_directory(fs, directory):
            raise
        return []
    # A file is listed as itself by some, an object that marks a "directory" by others.
    own = directory.strip("/")
    return [info for info in found if info["name"].strip("/") != own]


def _last(info: dict[str, Any]) -> str:
    return str(info["name"].rstrip("/").rpartition("/")[2])


def list_objects(fs: Any, directory: str, prefix: str) -> Iterator[Entry]:
    """All objects below ``directory`` whose next part begins with ``prefix``, of a file system
    without directories of its own: one listing of the first floor, one of all below each."""
    for info in _inside(fs, directory):
        if not _last(info).startswith(prefix):
            continue
        if info["type"] == "directory":
            below = fs.find(info["name"], detail=True)
            yield from (_entry(each) for each in below.values() if each["type"] != "directory")
        else:
            yield _entry(info)


def list_tree(fs: Any, directory: str, prefix: str) -> Iterator[Entry]:
    """The same, of a file system with directories: floor by floor, empty directories too. Links
    are listed, not followed."""
    for info in _inside(fs, directory):
        if not _last(info).startswith(prefix):
            continue
        if info["type"] != "directory":
            yield _entry(info)
            continue
        below = list(list_tree(fs, info["name"], ""))
        yield from below
        if not below:
            entry = _entry(info)
            yield entry._replace(path=f"{entry.path}/", size=0)


def is_directory(fs: Any, path: str) -> bool:
    """Whether ``path`` is there and a directory."""
    try:
        return bool(fs.info(path)["type"] == "directory")
    except FileNotFoundError:
        return False


def make_directories(fs: Any, path: str) -> None:
    """Make ``path`` and its parents. Others may do the same at the same time."""
    missing: list[str] = []
    current = path
    while current.strip("/") and not is_directory(fs, current):
        missing.append(current)
        current = current.rpartition("/")[0]
    for each in reversed(missing):
        try:
            fs.mkdir(each, create_parents=False)
        except Exception:
            if not is_directory(fs, each):
                raise


def remove_file(fs: Any, path: str) -> None:
    """Remove a file. One that is not there is no error."""
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_directory(fs: Any, path: str) -> bool:
    """Remove a directory if it is empty; whether it is gone now."""
    for attempt in range(3):
        try:
            fs.rmdir(path)
        except FileNotFoundError:
            return True
        except OSError:
            try:
                if fs.ls(path, detail=False):
                    return False
            except FileNotFoundError:
                return True
            if attempt == 2:
                raise
            # Empty after all: somebody else removed the last file just now.
        else:
            return True
    return False


def can_rename_if_absent(kind: type) -> bool:
    """Whether ``rename_if_absent`` works."""
    return kind.__module__ in ("fsspec.implementations.sftp", "fsspec.implementations.local")


def rename(fs: Any, source: str, target: str) -> None:
    """Give ``source`` the name ``target``, whatever has it now, at once."""
    if type(fs).__module__ == "fsspec.implementations.local":
        os.replace(source, target)
    else:
        fs.mv(source, target)


def rename_if_absent(fs: Any, source: str, target: str) -> None:
    """Give ``source`` the name ``target``, or ``FileExistsError``: of several callers one wins."""
    if type(fs).__module__ == "fsspec.implementations.local":
        os.link(source, target)
        os.unlink(source)
        return
    try:
        # SFTP's plain rename must fail where there is a file; OpenSSH makes a link and removes
        # the old name, so that nobody comes between.
        fs.ftp.rename(source, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        if fs.exists(target):
            raise FileExistsError(target) from error
        raise
