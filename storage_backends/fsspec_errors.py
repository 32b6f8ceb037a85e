"""From what fsspec's file systems raise to the errors of a byte store.

Belongs here: which of the engine's kinds an exception is, and its text without credentials. Does
not belong here: whether to try again (``retry``).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from dcp_engine.errors import CheckpointError, StorageError
from storage_backends.retry import Failure, causes, classify, http_status, service_code
from storage_backends.secrets import Secrets

__all__ = ["storage_calls", "translated"]

_HINTS = {
    "permission_denied": "check the credentials, and what they allow at this place",
    "disk_full": "free space or raise the quota, and save again",
    "unsupported_storage": "choose a storage that offers it",
}
_DENIED = re.compile(
    r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|"
    r"AuthenticationException|AuthenticationFailed|NoCredentials|PartialCredentials|"
    r"PermissionDenied|Unauthenticated|DefaultCredentials|BadHostKey"
)
_FULL = re.compile(r"QuotaExceeded|InsufficientStorage|XMinioStorageFull|No space left")

LONGEST_REASON = 500
"""Characters of what a library says; some print the whole request."""


def translated(
    error: BaseException, action: str, *, secrets: Secrets, checkpoint: str, file: str
) -> StorageError:
    """The engine's error for ``error``, met while doing ``action``."""
    kind = _kind(error)
    text = secrets.scrub(f"{error}".strip()) or "no reason was given"
    if len(text) > LONGEST_REASON:
        text = f"{text[:LONGEST_REASON]}..."
    made = StorageError(
        f"could not {action}: {text} ({type(error).__name__})",
        kind=kind,
        checkpoint=checkpoint,
        file=file,
        hint=_HINTS.get(kind),
    )
    made.errno = error.errno if isinstance(error, OSError) else None
    return made


def _kind(error: BaseException) -> str:
    for each in causes(error):
        words = f"{type(each).__name__} {service_code(each)}"
        status = http_status(each)
        number = each.errno if isinstance(each, OSError) else None
        if isinstance(each, PermissionError) or status in (401, 403) or _DENIED.search(words):
            return "permission_denied"
        if number in (errno.ENOSPC, errno.EDQUOT) or status == 507 or _FULL.search(words):
            return "disk_full"
        if isinstance(each, NotImplementedError) or number == errno.ENOSYS or status == 501:
            return "unsupported_storage"
    return "io_error"


def _is_missing(error: BaseException) -> bool:
    """Whether ``error`` says that a file is not there; fsspec's HTTP says so of all that fails."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    if not isinstance(cause, Exception):
        return True
    return classify(cause) is Failure.PERMANENT and _kind(cause) == "io_error"


@contextmanager
def storage_calls(
    action: str, *, secrets: Secrets, checkpoint: str, file: str, missing: bool = True
) -> Iterator[None]:
    """What the body raises becomes an error of a byte store, without credentials.

    ``FileNotFoundError`` and ``FileExistsError`` pass, naming ``file``: callers decide by them.
    With ``missing=False`` nothing can be missing but the place itself (a bucket), and that is an
    error like others. ``EOFError`` and the engine's own errors pass as they are.
    """
    try:
        yield
    except (CheckpointError, EOFError):
        raise
    except Exception as error:
        made: OSError
        if isinstance(error, FileExistsError):
            made = FileExistsError(errno.EEXIST, "File exists", f"{checkpoint}/{file}")
        elif missing and _is_missing(error):
            text = "No such file or directory"
            made = FileNotFoundError(errno.ENOENT, text, f"{checkpoint}/{file}")
        else:
            made = translated(error, action, secrets=secrets, checkpoint=checkpoint, file=file)
        # A traceback prints causes too.
        is_clean = not any(secrets.are_in(f"{each} {each!r}") for each in causes(error))
        raise made from (error if is_clean else None)
