"""The side that runs in the worker process: receive, handle, answer.

Belongs here: the loop, and how the process ends. Does not belong here: what requests mean.

The handler runs on the main thread, for whoever minds. Two other threads see to it that nothing
outlives the parent: one receives, so that end of file is seen while the handler works, the other
watches the parent itself, because end of file does not come while some forked child of the parent
holds the socket too. Either ends this process at once, as a SIGKILL would: whatever the handler
was doing is then left as it was.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import queue
import socket
import sys
import threading
import traceback
from functools import reduce
from typing import Any, NoReturn

from dcp_engine.executors.process.channel import Channel, Frame, PeerGone
from dcp_engine.executors.process.failure import as_failed
from dcp_engine.executors.process.handler import (
    Handler,
    HandlerFactory,
    WorkerContext,
    WorkerRequest,
)
from dcp_engine.executors.process.main_module import install
from dcp_engine.executors.process.manners import (
    be_polite,
    name_process,
    process_descriptor,
    wait_for_end,
)
from dcp_engine.executors.process.protocol import (
    Progress,
    Ready,
    Request,
    Response,
    Start,
    StartFailed,
    Terminate,
    decode_to_worker,
    encode,
)

__all__ = ["main"]

_ORPHANED = 3
"""Exit status when the parent is gone. Nobody sees it but whoever adopted the process."""
_Item = tuple[Request, Frame]


def main(fd: int) -> NoReturn:
    """The life of a worker; ``fd`` is its end of the socket pair."""
    os.set_inheritable(fd, False)
    channel = Channel(socket.socket(fileno=fd))
    frame = channel.receive()
    if frame is None:
        os._exit(_ORPHANED)
    start = decode_to_worker(frame.message)
    if not isinstance(start, Start):
        os._exit(1)
    name_process(start.name)
    faulthandler.enable()
    requests = _listen(channel, start.parent_pid)
    try:
        handler = _make_handler(start, frame.body)
    except BaseException:
        text = traceback.format_exc().encode("utf-8", "replace")
        _send(channel, encode(StartFailed()), text)
        _exit(1)
    # Not before: importing torch takes seconds of a processor, and with a part of one the worker
    # would not be up in time.
    be_polite(start.nice, start.idle_io)
    # What is there now stays for good: a collection need not look at it. Later ones are made
    # while nobody waits for an answer.
    gc.collect()
    gc.freeze()
    gc.disable()
    _send(channel, encode(Ready()))
    while (item := requests.get()) is not None:
        _answer(channel, handler, *item)
        del item
        if requests.empty():
            gc.collect()
    try:
        handler.close()
    except BaseException:
        traceback.print_exc()
        _exit(1)
    _exit(0)


def _listen(channel: Channel, parent: int) -> queue.SimpleQueue[_Item | None]:
    requests: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
    descriptor = process_descriptor(parent)
    if os.getppid() != parent:
        os._exit(_ORPHANED)  # it was gone before it could be watched

    def receive() -> None:
        while (frame := channel.receive()) is not None:
            message = decode_to_worker(frame.message)
            if isinstance(message, Request):
                requests.put((message, frame))
            elif isinstance(message, Terminate):
                requests.put(None)
        os._exit(_ORPHANED)

    def watch() -> None:
        wait_for_end(parent, descriptor)
        os._exit(_ORPHANED)

    for name, run in (("receive", receive), ("parent", watch)):
        threading.Thread(target=run, name=f"dcp_engine-{name}", daemon=True).start()
    return requests


def _make_handler(start: Start, init: bytes) -> Handler:
    sys.argv[:] = start.argv
    install(start.main)
    module, _, name = start.handler.partition(":")
    found: Any = importlib.import_module(module)
    factory: HandlerFactory = reduce(getattr, name.split("."), found)
    context = WorkerContext(name=start.name, rank=start.rank, parent_pid=start.parent_pid)
    return factory(init, context)


def _answer(channel: Channel, handler: Handler, message: Request, frame: Frame) -> None:
    def progress(body: bytes) -> None:
        _send(channel, encode(Progress(id=message.id)), body)

    request = WorkerRequest(
        kind=message.kind, body=frame.body, descriptors=frame.descriptors, progress=progress
    )
    try:
        answer: bytes | memoryview = memoryview(handler.handle(request)).cast("B")
        reply = encode(Response(id=message.id))
    except BaseException as error:  # SystemExit too: whether to end is the parent's to say
        failed, answer = as_failed(message.id, error)
        reply = encode(failed)
    _send(channel, reply, answer)


def _send(channel: Channel, message: bytes, body: bytes | memoryview = b"") -> None:
    try:
        channel.send(message, body)
    except PeerGone:
        os._exit(_ORPHANED)


def _exit(status: int) -> NoReturn:
    """End without the interpreter's own farewell: threads of gloo and of the handler may be in
    the middle of things, and everything that matters has been closed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # nobody reads it any more
    os._exit(status)
