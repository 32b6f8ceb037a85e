"""Calls to a file system, each made again where that helps, with the errors of a byte store.

Belongs here: what surrounds every call, reads and writes alike. Does not belong here: any call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dcp_engine.errors import UsageError
from storage_backends.fsspec_errors import storage_calls
from storage_backends.fsspec_open import FileSystems
from storage_backends.retry import RetryPolicy

__all__ = ["Limits", "Requests"]

T = TypeVar("T")

_MIN_REQUEST = 1 << 20
"""Bytes of a request that reads, however little memory there is."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How hard a store may work. What is None is chosen by the kind of file system."""

    streams: int | None = None
    """Requests at a time."""
    part_bytes: int | None = None
    """Bytes of one request that writes, 5 MiB at least on S3."""
    request_bytes: int | None = None
    """Most bytes of one request that reads."""
    max_inflight_bytes: int = 256 << 20
    """Bound of what is held in memory of files being written, and of what is held of answers
    unless ``request_bytes`` says more."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)


class Requests:
    """The way of one store to its file system."""

    def __init__(self, filesystems: FileSystems, limits: Limits) -> None:
        traits = filesystems.traits
        self.filesystems = filesystems
        self.traits = traits
        self.url = filesystems.url
        self.streams = traits.streams if limits.streams is None else limits.streams
        self.max_inflight_bytes = limits.max_inflight_bytes
        self.request_bytes = limits.request_bytes or max(
            _MIN_REQUEST, min(traits.request_bytes, self.max_inflight_bytes // max(self.streams, 1))
        )
        part_bytes = limits.part_bytes or traits.part_bytes
        if min(self.streams, self.request_bytes, part_bytes) < 1:
            raise UsageError("streams, part_bytes and request_bytes are positive numbers")
        self.part_bytes = min(part_bytes, max(1, self.max_inflight_bytes // 2))
        self._retry = limits.retry

    def is_of(self, *modules: str) -> bool:
        """Whether the file system's class is of one of these modules."""
        return self.filesystems.kind.__module__ in modules

    def make(
        self,
        name: str,
        action: str,
        call: Callable[[], T],
        *,
        missing: bool = True,
        policy: RetryPolicy | None = None,
        before_next: Callable[[BaseException], None] | None = None,
    ) -> T:
        """The result of ``call``.

        Args:
            name, action: for messages: the file, and what is done.
            missing: False where nothing can be missing but the place itself.
            policy: instead of the store's own.
            before_next: called with a failure before each new attempt.
        """
        secrets = self.filesystems.secrets
        with storage_calls(
            action, secrets=secrets, checkpoint=self.url, file=name, missing=missing
        ):
            return (policy or self._retry).call(
                call,
                what=f"{action} {self.url}/{name}",
                scrub=secrets.scrub,
                before_next=before_next,
            )

    def make_write(
        self, name: str, action: str, call: Callable[[], T], policy: RetryPolicy | None = None
    ) -> T:
        """The same for a call that writes: of an object store only the bucket can be missing."""
        return self.make(name, action, call, missing=self.traits.directories, policy=policy)

    def on(self, call: Callable[[Any], T]) -> Callable[[], T]:
        """``call`` on a file system that nobody else uses meanwhile."""

        def run() -> T:
            with self.filesystems.lease() as fs:
                return call(fs)

        return run
