"""An fsspec file system as slow as an object store, over a local directory.

Belongs here: latency and pace of its requests, in the manner of fsspec's own object stores (s3fs,
gcsfs, adlfs): asynchronous requests underneath, buffered files with read-ahead above. Does not
belong here: what is measured (``object_store``).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.spec import AbstractBufferedFile

__all__ = ["ThrottledFileSystem"]


class ThrottledFileSystem(AsyncFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Reads files below the root directory of the machine; ``throttled:///dev/shm/x`` is one.

    Args:
        latency: seconds from a request to its first byte.
        bandwidth: bytes a second of one stream.
        streams: requests served at once.
    """

    protocol = "throttled"
    cachable = False

    def __init__(self, *, latency: float, bandwidth: float, streams: int, **options: Any) -> None:
        super().__init__(**options)
        self._latency = latency
        self._bandwidth = bandwidth
        self._streams = streams
        self._limit: asyncio.Semaphore | None = None
        self.requests = 0
        self._active = 0
        self.peak_streams = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + os.fspath(path).removeprefix("throttled://").strip("/")

    async def _request(self, read: Callable[[], bytes] = bytes) -> bytes:
        if self._limit is None:
            self._limit = asyncio.Semaphore(self._streams)
        async with self._limit:
            self.requests += 1
            self._active += 1
            self.peak_streams = max(self.peak_streams, self._active)
            try:
                begin = time.monotonic()
                data = read()  # within the time that a stream takes, not on top of it
                moment = begin + self._latency + len(data) / self._bandwidth
                await asyncio.sleep(max(0.0, moment - time.monotonic()))
                return data
            finally:
                self._active -= 1

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_options: Any
    ) -> bytes:
        file = self._strip_protocol(path)
        begin = start or 0
        stop = min(os.path.getsize(file), end if end is not None else 1 << 62)
        wanted = max(0, stop - begin)

        def read() -> bytes:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                return os.pread(descriptor, wanted, begin)
            finally:
                os.close(descriptor)

        return await self._request(read)

    async def _info(self, path: str, **_options: Any) -> dict[str, Any]:
        await self._request()
        return _entry(Path(self._strip_protocol(path)))

    async def _ls(self, path: str, detail: bool = True, **_options: Any) -> list[Any]:
        await self._request()
        entries = [_entry(child) for child in Path(self._strip_protocol(path)).iterdir()]
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            raise NotImplementedError("this file system is only read")
        return _File(self, path, mode, **options)


class _File(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes = sync(self.fs.loop, self.fs._cat_file, self.path, start, end)
        return data


def _entry(path: Path) -> dict[str, Any]:
    status = path.stat()
    kind = "directory" if path.is_dir() else "file"
    return {"name": str(path), "size": status.st_size, "type": kind, "mtime": status.st_mtime}
