"""From the operating system's error numbers to the engine's errors.

Belongs here: the table, and the context manager that applies it. Does not belong here: any file
operation.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dcp_engine.errors import StorageError

__all__ = ["storage_error", "storage_errors"]

_KINDS = {
    errno.ENOSPC: ("disk_full", "free space and save again"),
    errno.EDQUOT: ("disk_full", "raise the quota or free space, and save again"),
    errno.EFBIG: ("disk_full", "the file system or RLIMIT_FSIZE does not allow files this large"),
    errno.EACCES: ("permission_denied", "check owner and mode of the directory"),
    errno.EPERM: ("permission_denied", "check owner, mode and attributes of the directory"),
    errno.EROFS: ("permission_denied", "the file system is mounted read-only"),
    errno.EMFILE: ("io_error", "raise the limit of open files (ulimit -n)"),
    errno.ENFILE: ("io_error", "the machine has too many open files"),
    errno.ENOENT: ("io_error", "nothing can be created at this path; check it"),
    errno.ENOTDIR: ("io_error", "a part of the path is a file, not a directory"),
    errno.ENAMETOOLONG: ("io_error", "choose a shorter path"),
    errno.ESTALE: ("io_error", "the network file system lost the file; try again"),
}


def storage_error(error: OSError, action: str, *, checkpoint: str, file: str) -> StorageError:
    """The engine's error for ``error``, met while doing ``action``. Keeps ``errno``."""
    number = error.errno
    kind, hint = _KINDS.get(number or 0, ("io_error", None))
    reason = os.strerror(number) if number is not None else str(error) or type(error).__name__
    translated = StorageError(
        f"could not {action}: {reason}", kind=kind, checkpoint=checkpoint, file=file, hint=hint
    )
    translated.errno = number
    return translated


@contextmanager
def storage_errors(action: str, *, checkpoint: str, file: str) -> Iterator[None]:
    """Raise ``StorageError`` for an ``OSError`` of the body. ``FileNotFoundError`` and
    ``FileExistsError`` pass, naming ``file``: callers decide by them."""
    try:
        yield
    except StorageError:
        raise
    except (FileNotFoundError, FileExistsError) as error:
        raise type(error)(error.errno, error.strerror, f"{checkpoint}/{file}") from error
    except OSError as error:
        raise storage_error(error, action, checkpoint=checkpoint, file=file) from error
