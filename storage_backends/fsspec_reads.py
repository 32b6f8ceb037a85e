"""Byte ranges of a file, read by many requests at once.

Belongs here: which requests to make of which ranges, and making them. Does not belong here:
retries and errors (``fsspec_store``).
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

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


_Answer = tuple[Request, bytes | BaseException]


class ShortRead(ConnectionError):
    """A request brought fewer bytes than it asked for: the file is short, or a connection broke."""

    def __init__(self, at: int) -> None:
        super().__init__(f"the answer ended before byte {at + 1}")


def plan_requests(
    ranges: Sequence[ReadRange], *, request_bytes: int, max_gap: int
) -> list[Request]:
    """Requests of at most ``request_bytes`` that bring all ``ranges``. Ranges that are at most
    ``max_gap`` bytes apart come in one; what is too long for one is divided evenly."""
    requests: list[Request] = []
    for run in _runs(ranges, max_gap):
        begin = run[0].offset
        nbytes = max(item.offset + item.buffer.nbytes for item in run) - begin
        count = -(-nbytes // request_bytes)
        borders = [begin + nbytes * n // count for n in range(count + 1)]
        targets: list[list[tuple[int, memoryview]]] = [[] for _ in range(count)]
        for item in run:
            at, end = item.offset, item.offset + item.buffer.nbytes
            number = bisect_right(borders, at) - 1
            while at < end:
                stop = min(end, borders[number + 1])
                view = item.buffer[at - item.offset : stop - item.offset]
                targets[number].append((at, view))
                at, number = stop, number + 1
        requests += [_request(pieces) for pieces in targets if pieces]
    return requests


def _runs(ranges: Sequence[ReadRange], max_gap: int) -> Iterator[list[ReadRange]]:
    """The ranges that hold bytes, sorted, those together that are near each other."""
    run: list[ReadRange] = []
    end = 0
    for item in sorted(ranges, key=lambda item: item.offset):
        if not item.buffer.nbytes:
            continue
        if run and item.offset - end > max_gap:
            yield run
            run = []
        end = (
            max(end, item.offset + item.buffer.nbytes) if run else item.offset + item.buffer.nbytes
        )
        run.append(item)
    if run:
        yield run


def _request(targets: list[tuple[int, memoryview]]) -> Request:
    begin = min(offset for offset, _ in targets)
    return Request(begin, max(offset + view.nbytes for offset, view in targets), targets)


def read_together(fs: Any, path: str, pending: list[Request], streams: asyncio.Semaphore) -> None:
    """Make all requests of an asynchronous file system at once, as far as ``streams`` lets them;
    each answer is held no longer than it takes to copy it.

    Those that are answered are taken out of ``pending``, also when others fail; of several
    failures the worst is raised.
    """
    answers: SimpleQueue[_Answer] = SimpleQueue()
    asked = asyncio.run_coroutine_threadsafe(
        _ask(fs, path, list(pending), streams, answers.put), fs.loop
    )
    failed: list[Request] = []
    errors: list[BaseException] = []
    try:
        for _ in range(len(pending)):
            request, answer = answers.get()
            try:
                if isinstance(answer, BaseException):
                    raise answer
                request.deliver(answer)
            except Exception as error:
                failed.append(request)
                errors.append(error)
    finally:
        asked.cancel()
    pending[:] = failed
    if errors:
        raise _worst(errors)


async def _ask(
    fs: Any,
    path: str,
    requests: Sequence[Request],
    streams: asyncio.Semaphore,
    answer: Callable[[_Answer], None],
) -> None:
    """As ``cat_ranges`` has it, but that several calls share the streams, and that a file system's
    own ``cat_ranges`` may join neighbours into one request, one stream (obstore's does)."""

    async def one(request: Request) -> None:
        try:
            async with streams:
                data = bytes(await fs._cat_file(path, start=request.begin, end=request.end))
        except BaseException as error:
            answer((request, error))
            if not isinstance(error, Exception):
                raise
        else:
            answer((request, data))

    await asyncio.gather(*map(one, requests))


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
