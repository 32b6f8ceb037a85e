"""What is known of fsspec's file systems: by it the store decides what it may promise.

Belongs here: the table. Does not belong here: calls to a file system.

fsspec does not tell whether a file appears at once, whether a rename is atomic, or whether one
instance may be used by several threads. What is not listed here is taken for an object store, as
DCP takes every file system: a file appears when all of it has arrived.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from dcp_engine.registry import EXTRAS

__all__ = ["Traits", "how_to_install", "options_for", "protocols_of", "traits_of", "usable_schemes"]

_TIMEOUT = 30
"""Seconds to connect. Seconds for a request are the client library's own business, but for SFTP,
which would wait for ever."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Of one file system."""

    writable: bool = True
    whole_puts: bool = True
    """A file appears when all of it has arrived, and takes another one's place at once. Where this
    is false, files are written to temporary names and renamed."""
    directories: bool = False
    shared: bool = True
    """Other processes see what is written."""
    thread_safe: bool = False
    """One instance serves all threads. (All asynchronous ones do.)"""
    streams: int = 16
    """Requests at a time."""
    part_bytes: int = 16 << 20
    """Of one request that writes."""
    request_bytes: int = 16 << 20
    """Of one request that reads, at most. At 20 ms a request and 100 MB/s a stream, 89 % of a
    request's time moves bytes."""
    max_gap: int = 256 << 10
    """Bytes read in vain rather than asked for separately: what a stream moves in some 3 ms."""


_OBJECT_STORE = Traits()
_FILE_SERVER = Traits(
    whole_puts=False, directories=True, streams=4, request_bytes=8 << 20, max_gap=1 << 20
)
_SFTP = replace(
    _FILE_SERVER,
    # 32 KiB travel in one packet; a part of this size costs two more round trips, open and close.
    part_bytes=8 << 20,
)
_READ_ONLY = Traits(writable=False)

_KNOWN = {
    **dict.fromkeys(("sftp", "ssh"), _SFTP),
    **dict.fromkeys(
        ("ftp", "smb", "hdfs", "arrow_hdfs", "webhdfs", "webHDFS", "dbfs", "root"), _FILE_SERVER
    ),
    **dict.fromkeys(("file", "local"), replace(_FILE_SERVER, thread_safe=True, streams=8)),
    "memory": Traits(shared=False, thread_safe=True, streams=1),
    **dict.fromkeys(
        ("http", "https", "zip", "tar", "libarchive", "git", "github", "gist", "reference", "data"),
        _READ_ONLY,
    ),
}

_OPTIONS: dict[str, dict[str, Any]] = {
    "s3fs": {
        "use_listings_cache": False,
        # Retries are ours: theirs would multiply with them.
        "config_kwargs": {
            "retries": {"max_attempts": 0},
            "connect_timeout": _TIMEOUT,
            "read_timeout": 60,
            "max_pool_connections": 64,
        },
    },
    "gcsfs": {"use_listings_cache": False},
    "adlfs": {"use_listings_cache": False},
    "fsspec.implementations.http": {"use_listings_cache": False},
    "fsspec.implementations.sftp": {
        "timeout": _TIMEOUT,
        "banner_timeout": _TIMEOUT,
        "auth_timeout": _TIMEOUT,
    },
}
"""By the module that implements a scheme, which is not the same everywhere."""

_PACKAGES = {
    "s3fs": ("s3", "s3a"),
    "gcsfs": ("gs", "gcs"),
    "adlfs": ("az", "abfs", "abfss", "adl"),
    "paramiko": ("sftp", "ssh"),
    "pyarrow": ("hdfs",),
    "smbprotocol": ("smb",),
    "aiohttp": ("http", "https"),
}
_PACKAGE_OF = {scheme: package for package, schemes in _PACKAGES.items() for scheme in schemes}


def how_to_install(scheme: str) -> str | None:
    """The command that brings what ``scheme`` needs; None if that is not known."""
    if scheme in EXTRAS:
        return f"pip install 'dcp_engine[{EXTRAS[scheme]}]'"
    return f"pip install {_PACKAGE_OF[scheme]}" if scheme in _PACKAGE_OF else None


def usable_schemes() -> tuple[list[str], list[str]]:
    """The usual schemes that can be used here, and those that lack a package."""
    have = {package: find_spec(package) is not None for package in _PACKAGES}
    usable = ["file", "ftp", "memory", *(s for s, package in _PACKAGE_OF.items() if have[package])]
    return sorted(usable), sorted(s for s, package in _PACKAGE_OF.items() if not have[package])


def protocols_of(filesystem: Any) -> tuple[str, ...]:
    """The names under which fsspec knows the kind of ``filesystem``."""
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def traits_of(protocols: tuple[str, ...]) -> Traits:
    """What is known of the file system of that name, or of one of those."""
    return next((_KNOWN[name] for name in protocols if name in _KNOWN), _OBJECT_STORE)


def options_for(implementation: type, given: dict[str, Any]) -> dict[str, Any]:
    """The options that a file system is opened with: ours, and over them the caller's. One level
    of dictionaries is merged, so that who sets a proxy does not lose the time-outs."""
    module = implementation.__module__
    known = _OPTIONS.get(module, _OPTIONS.get(module.partition(".")[0], {}))
    known = copy.deepcopy(known)
    merged = {**known, **given}
    for name, value in known.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            merged[name] = {**value, **given[name]}
    return merged
