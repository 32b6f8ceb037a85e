"""Finds the storage backend for a checkpoint's id, by URL scheme.

Belongs here: the ``Backend`` interface, the entry point group and its errors. Does not belong
here: any backend by name; the built-in ones come in by the same door as a third party's.

A package offers a backend by an entry point in group ``dcp_engine.storage_backends``: its name is
the URL scheme, its object a ``Backend`` or a class (callable without arguments) that makes one. The
name ``any_other``, which no URL can have as its scheme, stands for all schemes that no entry point
has as its name, and for chained URLs. The built-in fsspec backend has it, so that whoever offers a
backend for ``s3`` alone goes before it.
"""

from __future__ import annotations

import abc
import os
import re
import threading
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from dcp_engine.errors import CheckpointError, StorageError, UsageError
from dcp_engine.storage import ByteStore, StorageReader, StorageWriter

__all__ = [
    "ANY_OTHER",
    "ENTRY_POINT_GROUP",
    "EXTRAS",
    "Backend",
    "BackendRegistry",
    "Unavailable",
    "is_chained",
    "open_reader",
    "open_writer",
    "scheme_of",
]

ENTRY_POINT_GROUP = "dcp_engine.storage_backends"

ANY_OTHER = "any_other"
"""Name of the entry point of the backend for all other schemes, and for chained URLs."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(?:://|:/)")
_LINK = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:://.*)?")

EXTRAS: Mapping[str, str] = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("sftp", "ssh"), "sftp"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "azure"),
}
"""Schemes that need an extra of this distribution, and which."""


class Backend(abc.ABC):
    """A medium. Stateless, or with state that several threads may share."""

    @abc.abstractmethod
    def open_store(self, url: str | os.PathLike[str], **options: Any) -> ByteStore:
        """The byte store at ``url``. A backend that owns its layout, and so has no byte store,
        raises ``StorageError(kind="unsupported_storage")``."""

    @abc.abstractmethod
    def writer(self, checkpoint_id: str | os.PathLike[str], **options: Any) -> StorageWriter:
        """A writer that points to ``checkpoint_id``."""

    @abc.abstractmethod
    def reader(self, checkpoint_id: str | os.PathLike[str], **options: Any) -> StorageReader:
        """A reader that points to ``checkpoint_id``."""


def scheme_of(checkpoint_id: str | os.PathLike[str]) -> str:
    """The URL scheme, in lower case; ``"file"`` for plain paths and path objects.

    Of a chained URL (``a::b://...``) it is the last part's: that is where the bytes lie.
    """
    if not isinstance(checkpoint_id, str):
        return "file"
    match = _SCHEME.match(checkpoint_id.rpartition("::")[2])
    return match.group(1).lower() if match else "file"


def is_chained(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Whether it is a chained URL, as fsspec has them: ``simplecache::s3://bucket/run``."""
    if not isinstance(checkpoint_id, str) or "://" not in checkpoint_id:
        return False
    *links, last = checkpoint_id.split("::")
    return bool(links) and all(map(_LINK.fullmatch, [*links, last]))


class Unavailable:
    """Stands for a writer or a reader that could not be had, until the ranks are together: what
    one of them lacks, all of them must hear of. Whoever is handed it raises ``error`` then."""

    def __init__(self, error: CheckpointError) -> None:
        self.error = error


class BackendRegistry:
    """The backends of this environment. Thread-safe; loads each backend once, when needed.

    Args:
        backends: by scheme; they go before what is installed.
        entry_points: for tests; default: what is installed.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend] | None = None,
        *,
        entry_points: Iterable[metadata.EntryPoint] | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._backends = {scheme.lower(): backend for scheme, backend in (backends or {}).items()}
        self._given_entry_points = None if entry_points is None else tuple(entry_points)

    def schemes(self) -> list[str]:
        """All schemes that a backend is known for by name, ``any_other`` among them."""
        return sorted({*self._backends, *(point.name.lower() for point in self._entry_points())})

    def backend(self, checkpoint_id: str | os.PathLike[str]) -> Backend:
        """The backend for ``checkpoint_id``.

        Raises:
            StorageError: ``unsupported_storage`` when none is installed, or it cannot be imported;
                ``io_error`` when the environment could not be looked at.
            UsageError: two packages claim the scheme.
        """
        scheme = ANY_OTHER if is_chained(checkpoint_id) else scheme_of(checkpoint_id)
        with self._lock:
            backend = self._backends.get(scheme)
            if backend is None:
                try:
                    backend = self._load(scheme, checkpoint_id)
                except CheckpointError:
                    raise
                except OSError as error:
                    raise StorageError(
                        f"no storage backend could be looked for: {error}",
                        kind="io_error",
                        checkpoint=checkpoint_id,
                        hint="if there are too many open files, raise the limit (ulimit -n)",
                    ) from error
                self._backends[scheme] = backend
            return backend

    def open_store(self, url: str | os.PathLike[str], **options: Any) -> ByteStore:
        """The byte store at ``url``."""
        return self.backend(url).open_store(url, **options)

    def writer(self, checkpoint_id: str | os.PathLike[str], **options: Any) -> StorageWriter:
        """A writer that points to ``checkpoint_id``."""
        return self.backend(checkpoint_id).writer(checkpoint_id, **options)

    def reader(self, checkpoint_id: str | os.PathLike[str], **options: Any) -> StorageReader:
        """A reader that points to ``checkpoint_id``."""
        return self.backend(checkpoint_id).reader(checkpoint_id, **options)

    def _entry_points(self) -> Iterable[metadata.EntryPoint]:
        if self._given_entry_points is not None:
            return self._given_entry_points
        return metadata.entry_points(group=ENTRY_POINT_GROUP)

    def _load(self, scheme: str, checkpoint_id: str | os.PathLike[str]) -> Backend:
        found = list(self._entry_points())
        points: dict[str, metadata.EntryPoint] = {}
        for name in (scheme, ANY_OTHER):
            points = points or {p.value: p for p in found if p.name.lower() == name}
        if not points:
            raise StorageError(
                f"no storage backend for scheme {scheme!r} is installed; there are backends for "
                f"{', '.join(self.schemes()) or 'no scheme at all'}",
                kind="unsupported_storage",
                checkpoint=checkpoint_id,
                hint=self._install_hint(scheme),
            )
        if len(points) > 1:
            raise UsageError(
                f"several packages offer a storage backend for scheme {scheme!r}: "
                f"{', '.join(sorted(points))}",
                checkpoint=checkpoint_id,
                hint="uninstall all but one, or pass storage_writer= and storage_reader=",
            )
        value, point = points.popitem()
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise StorageError(
                f"the storage backend {value!r} for scheme {scheme!r} cannot be imported: {error}",
                kind="unsupported_storage",
                checkpoint=checkpoint_id,
                hint=self._install_hint(scheme),
            ) from error
        backend = loaded() if isinstance(loaded, type) else loaded
        if not isinstance(backend, Backend):
            raise StorageError(
                f"the storage backend {value!r} for scheme {scheme!r} is not a "
                "dcp_engine.registry.Backend",
                kind="unsupported_storage",
                checkpoint=checkpoint_id,
            )
        return backend

    @staticmethod
    def _install_hint(scheme: str) -> str:
        extra = EXTRAS.get(scheme)
        if extra is not None:
            return f"run: pip install 'dcp_engine[{extra}]'"
        if scheme == "file":
            return "install dcp_engine itself (pip install -e .), which brings this backend"
        return (
            f"install a package with an entry point {scheme!r} in group {ENTRY_POINT_GROUP!r}, "
            "or pass storage_writer= and storage_reader="
        )


def open_writer(checkpoint_id: str | os.PathLike[str], **options: Any) -> StorageWriter:
    """A writer of the installed backend for ``checkpoint_id``; see ``BackendRegistry``.

    Each call looks anew, so a backend with state of its own (``memory``) needs a registry that
    its user keeps.
    """
    return BackendRegistry().writer(checkpoint_id, **options)


def open_reader(checkpoint_id: str | os.PathLike[str], **options: Any) -> StorageReader:
    """A reader of the installed backend for ``checkpoint_id``; see ``open_writer``."""
    return BackendRegistry().reader(checkpoint_id, **options)
