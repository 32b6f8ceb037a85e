"""Sending an arena to another process: its descriptor (SCM_RIGHTS) and its size.

The connection must be one end of ``multiprocessing.Pipe(duplex=True)`` (a Unix socket), which
``multiprocessing`` can hand to a spawned child. Unlike inheritance this works at any time, for an
arena that is made after the child, and nothing listens for it in the background, as
``multiprocessing``'s own resource sharer does.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

from dcp_engine.errors import UsageError
from dcp_engine.staging.arena import Arena

__all__ = ["receive_arena", "send_arena"]

_GREETING = "dcp_engine arena"


def send_arena(connection: Connection, arena: Arena) -> None:
    """Send ``arena``; the other end calls ``receive_arena``. Sent once: after it has grown, the
    new size is enough (``Arena.extend``)."""
    connection.send((_GREETING, arena.size))
    # The process id is needed on Windows only.
    send_handle(connection, arena.fileno(), None)


def receive_arena(connection: Connection) -> Arena:
    """The arena that the other end sends, mapped here."""
    message = connection.recv()
    if not (isinstance(message, tuple) and len(message) == 2 and message[0] == _GREETING):
        raise UsageError(f"an arena was expected, not {type(message).__name__}")
    return Arena.attach(recv_handle(connection), message[1])
