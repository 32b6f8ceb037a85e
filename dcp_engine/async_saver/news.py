"""What a worker tells of a save before it answers, from one side to the other.

Belongs here: sending and receiving it. Does not belong here: what it means for a save whose worker
died (``verdict_of_death``).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dcp_engine.async_saver.messages import COMMITTED, SaveAnswer, SaveNews, decode, encode
from dcp_engine.async_saver.response import Progress
from dcp_engine.errors import CoordinationError
from dcp_engine.executors.process import WorkerRequest, packed, unpacked
from dcp_engine.native_storage import ColumnarWriter
from dcp_engine.storage import StorageWriter

__all__ = ["News", "NewsSender"]

_NEWS_INTERVAL = 0.2
"""Seconds between two messages about bytes written."""


class NewsSender:
    """Tells the parent of phases at once, of bytes now and then."""

    def __init__(self, request: WorkerRequest) -> None:
        self.writer: StorageWriter | None = None
        self._request = request
        self._phase = ""
        self._save_id = ""
        self._failure: BaseException | None = None
        self._next = 0.0

    def announce(self, save_id: str) -> None:
        """There is a save id."""
        if save_id != self._save_id:
            self._save_id = save_id
            self._send()

    def look(self, phase: str) -> None:
        """The save is in ``phase``; from any thread, and often."""
        if phase != self._phase or time.monotonic() >= self._next:
            self._phase = phase
            self._send()

    def fail(self, error: BaseException, *, ended: bool = False) -> None:
        """The save fails by ``error``; ``ended``: nothing is left to do."""
        known, self._failure = error is self._failure, error
        if ended or not known:
            self._send(failure=b"" if known else packed(error), ended=ended)
        if ended:
            self._failure = None  # its traceback leads here

    def succeed(self, answer: SaveAnswer) -> None:
        """The save is committed, and nothing is left to do."""
        self._phase = COMMITTED
        self._send(ended=True, answer=answer)

    def _send(
        self, *, failure: bytes = b"", ended: bool = False, answer: SaveAnswer | None = None
    ) -> None:
        self._next = time.monotonic() + _NEWS_INTERVAL
        writer = self.writer
        written = writer.bytes_written if isinstance(writer, ColumnarWriter) else 0
        news = SaveNews(
            phase=self._phase,
            bytes_done=written,
            save_id=self._save_id,
            failure=failure,
            ended=ended,
            answer=answer,
        )
        self._request.progress(encode(news))


class News:
    """Called with what the worker tells."""

    def __init__(self, tell: Callable[[Progress], None], total: int) -> None:
        self._tell = tell
        self._total = total
        self.save_id = ""
        self.phase = ""
        self.failure: BaseException | None = None
        """What the save fails with; the worker may be tidying up."""
        self.ended = False
        """The worker has nothing left to do in the operation, and may have left it."""
        self.answer: SaveAnswer | None = None

    def told_answer(self) -> SaveAnswer:
        """What was told before the worker left the operation."""
        if self.answer is None:
            raise CoordinationError("the worker did not tell how the save went", kind="out_of_step")
        return self.answer

    def __call__(self, body: bytes) -> None:
        news = decode(body, SaveNews)
        self.phase = news.phase
        self.save_id = news.save_id or self.save_id
        # A thread that still looks may speak behind the last word.
        self.ended = self.ended or news.ended
        self.answer = self.answer or news.answer
        if news.failure:
            self.failure = unpacked(news.failure, "the worker process")
        self._tell(Progress(phase=news.phase, bytes_done=news.bytes_done, bytes_total=self._total))
