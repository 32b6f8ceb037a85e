"""Byte ranges of a file, read by many requests at once.

Belongs here: which requests to make of which ranges, and making them. Does not belong here:
retries and errors (``fsspec_store``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fsspec.asyn import sync

from dcp_engine.storage import ReadRange
from storage_backends.retry import Failure, classify

__all__ = ["Request", "ShortRead", "plan_requests", "read_in_order", "read_together"]


class Request(NamedTuple):
    """Bytes ``begin`` to ``end`` of a file, and where they go: pieces of caller's memory, each
    with its offset in the file, in any order, perhaps overlapping."""

    begin: int
    end: int
    targets: list[tuple[int, memoryview]]

    def deliver(self, data: bytes | bytearray | memoryview) -> None:
        """Copy what was read to where it belongs."""
        view = memoryview(data)
        if view.nbytes != self.end - self.begin:
            raise ShortRead(self.begin + view.nbytes)
        for offset, target in self.targets:
            at = offset - self.begin
            target[:] = view[at : at + target.nbytes]


class ShortRead(ConnectionError):
    """A request brought fewer bytes than it asked for: the file is short, or a connection broke."""

    def __init__(self, at: int) -> None:
        super().__init__(f"the answer ended before byte {at + 1}")


def plan_requests(
    ranges: Sequence[ReadRange], *, request_bytes: int, max_gap: int
) -> list[Request]:
    """Requests of at most ``request_bytes`` that bring all ``ranges``. Ranges that are at most
    ``max_gap`` bytes apart come in one."""
    pieces = sorted(_pieces(ranges, request_bytes), key=lambda piece: piece[0])
    requests: list[Request] = []
    for offset, view in pieces:
        end = offset + view.nbytes
        if requests:
            last = requests[-1]
            whole = max(end, last.end)
            if offset - last.end <= max_gap and whole - last.begin <= request_bytes:
                last.targets.append((offset, view))
                requests[-1] = last._replace(end=whole)
                continue
        requests.append(Request(offset, end, [(offset, view)]))
    return requests


def _pieces(ranges: Sequence[ReadRange], nbytes: int) -> Iterator[tuple[int, memoryview]]:
    """The ranges, cut at multiples of ``nbytes`` so that neighbours can share a request."""
    for item in ranges:
        begin, end = item.offset, item.offset + item.buffer.nbytes
        while begin < end:
            stop = min(end, (begin // nbytes + 1) * nbytes)
            yield begin, item.buffer[begin - item.offset : stop - item.offset]
            begin = stop


def read_together(fs: Any, path: str, pending: list[Request], streams: asyncio.Semaphore) -> None:
    """Make all requests of an asynchronous file system at once, as far as ``streams`` lets them.

    Those that are answered are taken out of ``pending``, also when others fail; of several
    failures the worst is raised.
    """
    batch = list(pending)
    answers = sync(fs.loop, _answers, fs, path, batch, streams)
    failed: list[Request] = []
    errors: list[BaseException] = []
    for request, answer in zip(batch, answers, strict=True):
        try:
            if isinstance(answer, BaseException):
                raise answer
            request.deliver(answer)
        except Exception as error:
            failed.append(request)
            errors.append(error)
    pending[:] = failed
    if errors:
        raise _worst(errors)


async def _answers(
    fs: Any, path: str, requests: Sequence[Request], streams: asyncio.Semaphore
) -> list[bytes | BaseException]:
    """As ``cat_ranges`` has it, but that several calls share the streams, and that a file system's
    own ``cat_ranges`` may join neighbours into one request, one stream (obstore's does)."""

    async def one(request: Request) -> bytes:
        async with streams:
            return bytes(await fs._cat_file(path, start=request.begin, end=request.end))

    return await asyncio.gather(*map(one, requests), return_exceptions=True)


def _worst(errors: Sequence[BaseException]) -> BaseException:
    """The one that decides what to do: a permanent one before one that asks to slow down."""
    order = (Failure.PERMANENT, Failure.THROTTLED, Failure.TRANSIENT)
    return min(errors, key=lambda error: order.index(classify(error)))


def read_in_order(fs: Any, path: str, pending: list[Request]) -> None:
    """Make the requests one after the other, on one handle of a file system that waits for each.
    Those that are answered are taken out of ``pending``."""
    if type(fs).__module__ == "fsspec.implementations.memory":
        _read_memory(fs, path, pending)
        return
    with fs.open(path, "rb") as file:
        if hasattr(file, "readv"):
            # SFTP: all packets of all ranges are asked for before the first one is there.
            batch = list(pending)
            answers = file.readv([(each.begin, each.end - each.begin) for each in batch])
            for request, data in zip(batch, answers, strict=False):
                request.deliver(data)
                pending.remove(request)
        while pending:
            _read_one(file, pending[0])
            del pending[0]


def _read_one(file: Any, request: Request) -> None:
    file.seek(request.begin)
    offset, only = request.targets[0]
    direct = len(request.targets) == 1 and offset == request.begin
    nbytes = request.end - request.begin
    view = only if direct and only.nbytes == nbytes else memoryview(bytearray(nbytes))
    done = 0
    while done < nbytes:
        count = file.readinto(view[done:])
        if not count:
            raise ShortRead(request.begin + done)
        done += count
    if view is not only:
        request.deliver(view)


def _read_memory(fs: Any, path: str, pending: list[Request]) -> None:
    """A file of it is one object with one position, whoever opens it."""
    file = fs.store.get(fs._strip_protocol(path))
    if file is None:
        raise FileNotFoundError(path)
    with file.getbuffer() as content:
        while pending:
            pending[0].deliver(content[pending[0].begin : pending[0].end])
            del pending[0]
