"""The end of files: durable, closed, and as long as they should be.

Belongs here: the order of syncs of one rank's files. Does not belong here: what is in them
(``write_files``, ``rank_save``), and directories.
"""

from __future__ import annotations

import errno
from types import TracebackType

from dcp_engine.errors import InvalidPlanError
from dcp_engine.storage import ByteStore, ByteStoreFile
from storage_backends.store_errors import writing

__all__ = ["OpenFiles"]

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class OpenFiles:
    """Files all of whose bytes were handed to the medium. They are made durable together: while
    the first one is synced the others are on their way too, and one commit of the file system's
    journal serves them all.

    A context manager: of files that are left open, on any failure, nothing remains.
    """

    def __init__(self, store: ByteStore) -> None:
        self._store = store
        self._files: dict[str, tuple[ByteStoreFile, int]] = {}

    def create(self, name: str, size: int) -> ByteStoreFile:
        """A new file of the store; where no descriptor is left for it, those held are ended first.

        Raises what ``ByteStore.create`` raises.
        """
        try:
            return self._store.create(name, size)
        except OSError as error:
            if not self._files or error.errno not in _NO_DESCRIPTORS:
                raise
        self.finish()
        return self._store.create(name, size)

    def add(self, name: str, file: ByteStoreFile, size: int) -> None:
        """Take over ``file``, which is to have ``size`` bytes."""
        self._files[name] = (file, size)
        if not self._store.random_write:
            self.finish()  # there the end of a file waits in memory

    def finish(self) -> None:
        """Sync and close all, in the order in which they came.

        Raises ``InvalidPlanError(kind="results_mismatch")`` if the medium holds another number of
        bytes afterwards.
        """
        for name, (file, size) in list(self._files.items()):
            with writing(self._store, "make the file durable", file=name):
                file.sync()
                file.close()
                _compare_size(self._store, name, size)
                del self._files[name]

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._files:
            self._files.popitem()[1][0].abort()


def _compare_size(store: ByteStore, name: str, size: int) -> None:
    found = store.size(name)
    if found != size:
        raise InvalidPlanError(
            f"{size} bytes were written, and the medium holds {found}",
            kind="results_mismatch",
            checkpoint=store.url,
            file=name,
            hint="nothing was committed; check the file system",
        )
