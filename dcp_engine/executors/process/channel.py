"""Frames over a Unix socket: a message, a body of any size, and file descriptors.

Belongs here: getting bytes across, whole, with a deadline, and noticing that the other end is
gone. Does not belong here: what they mean (``protocol``).

A frame is the length of the message (4 bytes), the length of the body (8 bytes, both little
endian), message, body. Descriptors go with its first byte. One thread receives, any may send.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dcp_engine.errors import UsageError

__all__ = ["LOOK_S", "MAX_DESCRIPTORS", "Channel", "Frame", "PeerGone"]

MAX_DESCRIPTORS = 253
"""With one message; the kernel's limit."""
LOOK_S = 0.5
"""Between two calls of ``meanwhile``, at most."""
_PREFIX = struct.Struct("<IQ")
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)


class PeerGone(Exception):
    """The other end has closed the socket, or has ended. Never leaves this package."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What came."""

    message: bytes
    body: bytes
    descriptors: list[int] = field(default_factory=list)


class Channel:
    """One end of a socket pair, which it owns.

    Args:
        watched: a descriptor that gets readable when the other process ends (a pidfd): a socket
            does not say so while some child of that process holds it open, too. Not owned.
    """

    def __init__(self, end: socket.socket, watched: int | None = None) -> None:
        self._socket = end
        self._watched = watched
        self._sending = threading.Lock()
        self._torn = False

    def send(
        self,
        message: bytes,
        body: bytes | memoryview = b"",
        descriptors: Sequence[int] = (),
        *,
        deadline: float | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Send one frame.

        Args:
            body: bytes, or a view of format "B".
            deadline: by ``time.monotonic``.
            meanwhile: called now and then while the other end takes nothing; what it raises ends
                the sending, like ``TimeoutError``.

        Raises:
            PeerGone: see there.
            TimeoutError: the other end did not take it in time. If it had taken a part, nothing
                can be sent any more (``torn``).
        """
        if len(descriptors) > MAX_DESCRIPTORS:
            raise UsageError(
                f"{len(descriptors)} descriptors cannot be sent at once, {MAX_DESCRIPTORS} can"
            )
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        if not self._sending.acquire(timeout=-1 if left is None else left):
            raise TimeoutError
        try:
            if self._torn:
                raise PeerGone("an earlier message was sent in part")
            self._send(message, body, descriptors, deadline, meanwhile)
        finally:
            self._sending.release()

    @property
    def torn(self) -> bool:
        """Whether a message was sent in part, so that no other can follow."""
        return self._torn

    def _send(
        self,
        message: bytes,
        body: bytes | memoryview,
        descriptors: Sequence[int],
        deadline: float | None,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        rest = [memoryview(_PREFIX.pack(len(message), len(body)) + message), memoryview(body)]
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            if descriptors
            else []
        )
        begun = False
        try:
            while rest:
                try:
                    sent = self._socket.sendmsg(rest, ancillary, _NOW)
                except BlockingIOError:
                    self._wait(select.POLLOUT, deadline, meanwhile)
                    continue
                begun, ancillary = True, []
                rest = _after(rest, sent)
        except TimeoutError:
            self._torn = begun
            raise
        except OSError as error:
            raise PeerGone(str(error)) from None
        except BaseException:
            self._torn = begun
            raise

    def receive(self, deadline: float | None = None) -> Frame | None:
        """The next frame; None when the other end is gone, in the middle of one too.

        Raises:
            TimeoutError: no frame was complete at ``deadline``.
        """
        descriptors: list[int] = []
        try:
            prefix = self._take(_PREFIX.size, deadline, descriptors)
            message_size, body_size = _PREFIX.unpack(prefix)
            message = bytes(self._take(message_size, deadline))
            return Frame(
                message=message,
                body=bytes(self._take(body_size, deadline)),
                descriptors=descriptors,
            )
        except PeerGone:
            for descriptor in descriptors:
                os.close(descriptor)
            return None

    def _take(
        self, size: int, deadline: float | None, descriptors: list[int] | None = None
    ) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                if descriptors is None:
                    got = self._socket.recv_into(view, 0, socket.MSG_DONTWAIT)
                else:
                    got = self._take_with_descriptors(view, descriptors)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise PeerGone(str(error)) from None
            if got == 0:
                raise PeerGone("end of file")
            view = view[got:]
        return data

    def _take_with_descriptors(self, view: memoryview, descriptors: list[int]) -> int:
        got, ancillary, _, _ = self._socket.recvmsg_into(
            [view], _ANCILLARY, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received = array.array("i")
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
                descriptors.extend(received)
        return got

    def _wait(
        self, event: int, deadline: float | None, meanwhile: Callable[[], None] | None = None
    ) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        if self._watched is not None:
            poll.register(self._watched, select.POLLIN)
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            limit = left
            if meanwhile is not None:
                limit = LOOK_S if left is None else min(left, LOOK_S)
            ready = poll.poll(None if limit is None else limit * 1000)
            if ready:
                break
            if left == limit:
                raise TimeoutError
            if meanwhile is not None:
                meanwhile()
        # What the other process had sent before it ended is still to be read.
        if all(descriptor == self._watched for descriptor, _ in ready):
            raise PeerGone("the process has ended")

    def close(self) -> None:
        """Close this end. May be called twice. Not while the other end lives and reads nothing:
        a sender may then hold the socket for as long as its deadline is."""
        with self._sending:
            self._socket.close()


def _after(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of ``parts`` behind their first ``sent`` bytes."""
    rest = []
    for part in parts:
        taken = min(sent, len(part))
        sent -= taken
        if taken < len(part):
            rest.append(part[taken:])
    return rest
