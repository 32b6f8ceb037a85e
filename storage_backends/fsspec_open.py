"""From a URL and options, or from a file system object, to file systems ready for use.

Belongs here: chained URLs, caches, instances for several threads, and what to install when
something is missing. Does not belong here: bytes (``fsspec_store``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.registry import known_implementations
from fsspec.registry import registry as loaded_implementations

from dcp_engine.errors import CheckpointError, StorageError, UsageError
from dcp_engine.redaction import redact_url
from dcp_engine.registry import ENTRY_POINT_GROUP
from storage_backends.fsspec_traits import (
    Traits,
    how_to_install,
    options_for,
    protocols_of,
    traits_of,
    usable_schemes,
)
from storage_backends.retry import Failure, RetryPolicy, classify
from storage_backends.secrets import Secrets

__all__ = ["FileSystems", "known_protocols", "open_filesystems", "require_known"]

CHANNEL_TIMEOUT = 60.0
"""Seconds without a packet after which an SFTP connection counts as broken."""


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """A file system taken apart."""

    fs: Any
    """The one that holds the bytes."""
    path: str
    cache: Any
    """A caching file system around ``fs``, of the same paths; or None."""


class FileSystems:
    """The file system of one store: one instance, or one for each thread that uses it.

    Args:
        make: makes an instance of its own.
        first: an instance that ``make`` made, taken apart.
        traits: of the file system that holds the bytes.
        secrets: to be kept out of messages.
        url: for messages.
    """

    def __init__(
        self,
        make: Callable[[], _Layers],
        first: _Layers,
        traits: Traits,
        secrets: Secrets,
        url: str,
    ) -> None:
        self.url = url
        self.path = first.path.rstrip("/")
        self.traits = traits
        self.secrets = secrets
        self.cache = first.cache
        self.cache_lock = threading.Lock()
        self.is_async = bool(first.fs.async_impl)
        self.kind = type(first.fs)
        self._make = make
        self._is_shared = self.is_async or traits.thread_safe
        self._free = [first.fs]
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def lease(self) -> Iterator[Any]:
        """An instance that no other thread uses meanwhile, unless it serves all. One whose
        connection failed is not used again."""
        if self._is_shared:
            yield self._free[0]
            return
        with self._lock:
            fs = self._free.pop() if self._free else None
        if fs is None:
            fs = self._make().fs
        try:
            yield fs
        except BaseException as error:
            if classify(error) is not Failure.PERMANENT or not isinstance(error, Exception):
                _disconnect(fs)
            else:
                self._give_back(fs)
            raise
        self._give_back(fs)

    def _give_back(self, fs: Any) -> None:
        with self._lock:
            if not self._closed:
                self._free.append(fs)
                return
        _disconnect(fs)

    def close(self) -> None:
        """Close connections that are this store's own. Idle ones now, others when they are given
        back."""
        with self._lock:
            self._closed = True
            free = [] if self._is_shared else self._free
            if free:
                self._free = []
        for fs in free:
            _disconnect(fs)


def _disconnect(fs: Any) -> None:
    for name in ("ftp", "client"):
        close = getattr(getattr(fs, name, None), "close", None)
        if close is not None:
            with suppress(Exception):  # it is broken, or on its way out
                close()


def open_filesystems(
    url: str,
    options: Mapping[str, Any],
    *,
    last_options: Mapping[str, Any],
    fs: Any = None,
    retry: RetryPolicy,
) -> FileSystems:
    """What ``url`` names.

    Args:
        options: as ``fsspec.core.url_to_fs`` takes them: of the first link of a chained URL, or by
            protocol.
        fs: an instance to use instead of opening one; ``url`` is then a path in it, or a URL of it.
        last_options: of the last link.
        retry: of a connection that is made when it is opened.

    Raises ``StorageError(kind="unsupported_storage")`` for a scheme that is not known or needs a
    package that is not there, ``UsageError`` for options that do not fit, ``StorageError`` if
    there is no connection.
    """
    secrets = Secrets(url, {"options": dict(options), "last": dict(last_options)})
    if fs is not None and (options or last_options):
        raise UsageError("options say how to open a file system, and fs is open", checkpoint=url)
    with _opening(url, secrets):
        if fs is not None:
            make = _maker_of_instance(fs, url)
            first = _prepared(fs, _path_in(fs, url), own=False)
        else:
            make = _maker_of_url(url, options, last_options)
            first = retry.call(make, what=f"open {redact_url(url)}", scrub=secrets.scrub)
    traits = traits_of(protocols_of(first.fs))
    return FileSystems(make, first, traits, secrets, redact_url(url))


@contextmanager
def _opening(url: str, secrets: Secrets) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise _could_not_open(url, error, secrets) from (
            None if secrets.are_in(_texts(error)) else error
        )


def _texts(error: BaseException) -> str:
    return f"{error} {error.__cause__} {error.__context__}"


def _could_not_open(url: str, error: Exception, secrets: Secrets) -> CheckpointError:
    text = secrets.scrub(f"{type(error).__name__}: {error}")
    if isinstance(error, TypeError | KeyError):
        return UsageError(
            f"the file system does not take these options ({text})",
            checkpoint=url,
            hint="see the documentation of that file system's fsspec class",
        )
    if isinstance(error, PermissionError) or "uthentication" in type(error).__name__:
        return StorageError(
            f"the storage refuses access ({text})",
            kind="permission_denied",
            checkpoint=url,
            hint="check the credentials",
        )
    return StorageError(f"could not open the storage ({text})", checkpoint=url)


def _maker_of_instance(fs: Any, url: str) -> Callable[[], _Layers]:
    def make() -> _Layers:
        again = type(fs)(*fs.storage_args, **fs.storage_options, skip_instance_cache=True)
        return _prepared(again, _path_in(again, url), own=False)

    return make


def _path_in(fs: Any, url: str) -> str:
    """The path that ``url`` has in ``fs``."""
    scheme, colon, rest = url.partition("://")
    if colon and scheme in protocols_of(fs) and fs._strip_protocol(url) == url:
        return rest  # a class for several protocols does not know which one its instance has
    return str(fs._strip_protocol(url)) if colon else url


def _maker_of_url(
    url: str, options: Mapping[str, Any], last_options: Mapping[str, Any]
) -> Callable[[], _Layers]:
    # A link "dir" without a path of its own changes nothing, but fsspec would apply its path twice.
    url = "::".join(link for link in url.split("::") if link not in ("dir", "dir://"))
    links = _protocols(url)
    by_link: dict[str, dict[str, Any]] = {}
    for position, protocol in enumerate(links):
        implementation = _implementation(protocol, url)
        given = dict(options.get(protocol) or {}) if len(links) > 1 else {}
        if position == 0:
            given = {**{k: v for k, v in options.items() if k not in links}, **given}
        if position == len(links) - 1:
            given = {**last_options, **given}
        by_link[protocol] = options_for(implementation, given)
        if not implementation.async_impl:
            # fsspec keeps instances by thread and options, also those whose connection broke.
            by_link[protocol]["skip_instance_cache"] = True
    arguments = by_link if len(links) > 1 else by_link[links[0]]

    def make() -> _Layers:
        return _prepared(*url_to_fs(url, **arguments), own=True)

    return make


def _protocols(url: str) -> list[str]:
    """The protocols of the links of ``url``, the first link first."""
    known = known_protocols()
    found = []
    for link in url.split("::"):
        scheme, colon, _ = link.partition("://")
        if colon:
            found.append(scheme)
        else:
            found.append(link if link in known else "file")
    return found


def known_protocols() -> frozenset[str]:
    """The schemes that fsspec knows, installed or not."""
    return frozenset({*known_implementations, *loaded_implementations})


def _implementation(protocol: str, url: str) -> Any:
    usable, lacking = usable_schemes()
    installed = f"these can be used here: {', '.join(usable)}"
    if protocol not in known_protocols():
        more = f"; with a package more: {', '.join(lacking)}" if lacking else ""
        raise StorageError(
            f"no storage backend for scheme {protocol!r} is installed, and fsspec does not know "
            f"it either; {installed}{more}",
            kind="unsupported_storage",
            checkpoint=url,
            hint=f"check the scheme, or install a package with an entry point {protocol!r} in "
            f"group {ENTRY_POINT_GROUP!r}",
        )
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        command = how_to_install(protocol)
        raise StorageError(
            f"scheme {protocol!r} needs a package that is not installed ({error}); {installed}",
            kind="unsupported_storage",
            checkpoint=url,
            hint=None if command is None else f"run: {command}",
        ) from error


def require_known(url: str) -> None:
    """Raise ``StorageError(kind="unsupported_storage")`` unless every link of ``url`` is of a
    scheme that fsspec knows and whose package is installed."""
    for protocol in _protocols(url):
        _implementation(protocol, url)


def _prepared(fs: Any, path: str, *, own: bool) -> _Layers:
    """``fs`` taken apart, and set to remember nothing that others may change; if it is our own, to
    leave retries to us."""
    cache = None
    while isinstance(fs, DirFileSystem | CachingFileSystem):
        if isinstance(fs, DirFileSystem):
            path = fs._join(path)
        else:
            cache = fs
        fs = fs.fs
        if isinstance(fs, DirFileSystem) and cache is not None:
            cache = None  # its paths are no longer those below
    fs.dircache.use_listings_cache = False
    fs.dircache.clear()
    if own and type(fs).__module__ == "s3fs.core":
        fs.retries = 1
    channel = getattr(getattr(fs, "ftp", None), "get_channel", None)
    if channel is not None:
        channel().settimeout(CHANNEL_TIMEOUT)
    return _Layers(fs=fs, path=path, cache=cache)
