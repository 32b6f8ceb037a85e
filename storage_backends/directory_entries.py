"""What lies in a directory, and removing it: relative to descriptors, following no links.

Belongs here: walking and removing. Does not belong here: paths from a root, errors of the engine
(``filesystem_store``).
"""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["DIRECTORY_FLAGS", "remove", "remove_empty_directory", "walk"]

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
"""How a directory is opened; below the root with ``O_NOFOLLOW`` too."""


def walk(directory: int, path: str, prefix: str, found: list[tuple[str, int, float]]) -> None:
    """All files below ``directory`` whose first part begins with ``prefix``; a directory that
    holds nothing is listed by its name and a slash. Links are listed, not followed."""
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if entry.name.startswith(prefix))
    for name in names:
        full = f"{path}/{name}" if path else name
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                found.append((full, status.st_size, status.st_mtime))
                continue
            inner = os.open(name, DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=directory)
        except FileNotFoundError:
            continue  # removed by somebody while we looked
        try:
            before = len(found)
            walk(inner, full, "", found)
            if len(found) == before:
                found.append((f"{full}/", 0, status.st_mtime))
        finally:
            os.close(inner)


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
