"""From whatever a byte store raises to the engine's errors.

Belongs here: the outer net for calls to a ``ByteStore``, one's own or a third party's. Does not
belong here: what a missing or a short file means to a reader (``open_checkpoint``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dcp_engine.errors import CheckpointError, ConflictError, StorageError
from dcp_engine.storage import ByteStore
from storage_backends.os_errors import storage_error

__all__ = ["require_shared", "writing"]


def require_shared(store: ByteStore, others: str) -> None:
    """Raise ``unsupported_storage`` if only one process sees what is in ``store``; ``others`` says
    who else was to see it."""
    if not store.shared_between_processes:
        raise StorageError(
            f"{type(store).__name__} is seen by one process only, and {others}",
            kind="unsupported_storage",
            checkpoint=store.url,
            hint="choose a storage that all of them share",
        )


@contextmanager
def writing(store: ByteStore, action: str, *, file: str) -> Iterator[None]:
    """Every ``OSError`` of the body becomes a ``CheckpointError`` that names store and file.

    A missing parent means that somebody removed the data directory: an aborted save's ranks do,
    and so may a clean-up. That is a ``ConflictError``.
    """
    try:
        yield
    except CheckpointError as error:
        error.with_context(checkpoint=store.url, file=file)
        raise
    except FileNotFoundError as error:
        raise ConflictError(
            f"could not {action}: the data directory was removed while this save was running",
            checkpoint=store.url,
            file=file,
            hint="another rank gave the save up, or a clean-up took it for dead; save again",
        ) from error
    except FileExistsError as error:
        raise ConflictError(
            f"could not {action}: the name is taken",
            checkpoint=store.url,
            file=file,
            hint="two saves use one save id; save again with another one",
        ) from error
    except OSError as error:
        raise storage_error(error, action, checkpoint=store.url, file=file) from error
    except EOFError as error:
        raise StorageError(
            f"could not {action}: {error}", checkpoint=store.url, file=file
        ) from error
