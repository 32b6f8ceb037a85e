"""Messages between a parent and its worker.

Belongs here: their types and their encoding. Does not belong here: how bytes get across
(``channel``), and what a request's kind and body mean.

Bodies, which may be large, travel beside the message and not in it.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "Failed",
    "FromWorker",
    "MainModule",
    "Progress",
    "Ready",
    "Request",
    "Response",
    "Start",
    "StartFailed",
    "Terminate",
    "ToWorker",
    "decode_from_worker",
    "decode_to_worker",
    "encode",
]


class MainModule(msgspec.Struct, frozen=True, kw_only=True):
    """The parent's main module: enough to load its classes elsewhere."""

    path: str | None
    """None if it has no file: an interactive session, ``python -c``, standard input."""
    package: str | None = None
    """For its relative imports."""


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the worker, first. Body: the factory's ``init``."""

    handler: str
    name: str
    rank: int
    parent_pid: int
    nice: int
    idle_io: bool
    argv: list[str]
    main: MainModule


class Request(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the worker. Body and descriptors are the request's."""

    id: int
    kind: str


class Terminate(msgspec.Struct, frozen=True, tag=True):
    """To the worker: end when the requests before this one are done."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From the worker: the factory has returned."""


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """From the worker, which then ends. Body: the traceback."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the worker. Body: the handler's."""

    id: int


class Response(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the worker. Body: the handler's answer."""

    id: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the worker: the handler raised. Body: the pickled exception, or nothing."""

    id: int
    type_name: str
    message: str
    """Type and text."""
    text: str
    """The formatted traceback."""


ToWorker = Start | Request | Terminate
FromWorker = Ready | StartFailed | Progress | Response | Failed

_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """As bytes, for ``Channel.send``."""
    return msgspec.msgpack.encode(message)


def decode_to_worker(data: bytes) -> ToWorker:
    """In the worker."""
    return _to_worker.decode(data)


def decode_from_worker(data: bytes) -> FromWorker:
    """In the parent. An empty message is a failure from before there was any encoding."""
    return _from_worker.decode(data) if data else StartFailed()
