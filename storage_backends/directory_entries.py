"""What lies in a directory, and removing it: relative to descriptors, following no links.

Belongs here: walking and removing. Does not belong here: paths from a root, errors of the engine
(``filesystem_store``).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

__all__ = ["DIRECTORY_FLAGS", "Entry", "remove", "remove_empty_directory", "walk"]

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
"""How a directory is opened; below the root with ``O_NOFOLLOW`` too."""


class Entry(NamedTuple):
    """What ``walk`` found."""

    name: str
    size: int
    changed: float
    """Seconds since 1970, by the clock that stamps files there."""
    unreadable: bool = False
    """A directory that this process may not look into; all that is known of it is its name."""


def walk(directory: int, path: str, prefix: str, found: list[Entry]) -> None:
    """All files below ``directory`` whose first part begins with ``prefix``; a directory that
    holds nothing is listed by its name and a slash, and so is one that may not be read. Links are
    listed, not followed. Raises ``PermissionError`` if ``directory`` itself may not be read."""
    _walk(directory, path, _entries(directory, prefix), found)


def _walk(
    directory: int, path: str, entries: list[tuple[str, os.stat_result]], found: list[Entry]
) -> None:
    for name, status in entries:
        full = f"{path}/{name}" if path else name
        if not stat.S_ISDIR(status.st_mode):
            found.append(Entry(full, status.st_size, status.st_mtime))
            continue
        try:
            inner = os.open(name, DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=directory)
        except FileNotFoundError:
            continue  # removed by somebody while we looked
        except PermissionError:
            found.append(Entry(f"{full}/", 0, status.st_mtime, unreadable=True))
            continue
        try:
            try:
                below = _entries(inner, "")
            except PermissionError:
                found.append(Entry(f"{full}/", 0, status.st_mtime, unreadable=True))
                continue
            before = len(found)
            _walk(inner, full, below, found)
            if len(found) == before:
                found.append(Entry(f"{full}/", 0, status.st_mtime))
        finally:
            os.close(inner)


def _entries(directory: int, prefix: str) -> list[tuple[str, os.stat_result]]:
    """What lies in ``directory`` and begins with ``prefix``, by name."""
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if entry.name.startswith(prefix))
    found = []
    for name in names:
        try:
            found.append((name, os.stat(name, dir_fd=directory, follow_symlinks=False)))
        except FileNotFoundError:
            continue  # removed by somebody while we looked
    return found


def remove(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except (IsADirectoryError, PermissionError):
        # Linux says EISDIR for a directory, POSIX allows EPERM.
        if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise
        remove_empty_directory(name, directory)


def remove_empty_directory(name: str, directory: int) -> bool:
    """Whether the directory is gone."""
    try:
        os.rmdir(name, dir_fd=directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            return False
        raise
    return True
