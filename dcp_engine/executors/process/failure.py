"""Exceptions on their way from a worker to its parent.

Belongs here: making an exception of a handler ready to travel, raising it on the other side, and
the errors that a worker process itself gives rise to.

An exception travels pickled if it comes out of that as what it was; else as its text. Between a
process and the child it started, pickle is no new risk.
"""

from __future__ import annotations

import copy
import pickle
import traceback

import msgspec

from dcp_engine.coordination.failures import capture, raised_by_exit, restore
from dcp_engine.errors import CheckpointException, CoordinationError
from dcp_engine.executors.process.protocol import Failed

__all__ = [
    "WorkerError",
    "WorkerFailure",
    "again",
    "as_failed",
    "late",
    "packed",
    "raised_by",
    "stalled",
    "unpacked",
]

_PICKLE_LIMIT = 1 << 20  # an exception that drags tensors along travels as text
_TEXT_LIMIT = 64 << 10
_MESSAGE_LIMIT = 1000


class WorkerError(CoordinationError):
    """A worker process did not start (kind ``worker_start``), ended while it was needed
    (``worker_died``), did not answer in time (``timeout``), or was stopped (``stalled``)."""

    default_kind = "worker_died"


class WorkerFailure(CoordinationError):
    """What a worker's handler raised, where it cannot be raised here as it is.

    ``type_name`` is the type of the original, with its module.
    """

    default_kind = "rank_failed"
    type_name = ""


def again(end: WorkerError | None, doing: str | None = None) -> WorkerError:
    """The end of a worker, as a new exception for each who asks.

    Args:
        end: as it was seen.
        doing: the request that was in flight.
    """
    if end is None:
        end = WorkerError("the worker process is gone")
    during = f", with {doing} in flight" if doing else ""
    error = WorkerError(end.message + during, kind=end.kind, rank=end.rank, hint=end.hint)
    for note in getattr(end, "__notes__", ()):
        error.add_note(note)
    return error


def late(worker: str, rank: int, kind: str, timeout: float | None, what: str) -> WorkerError:
    """A call's deadline has passed."""
    limit = f"{timeout:.3g} s" if timeout is not None else "no time at all"
    return WorkerError(
        f'{worker}: {what} to "{kind}" within {limit}',
        kind="timeout",
        rank=rank,
        hint="the worker still works on it, or on what came before",
    )


def stalled(worker: str, rank: int, kind: str, seconds: float) -> WorkerError:
    """The process was stopped in a call, and is killed."""
    return WorkerError(
        f'{worker} was stopped for {seconds:.3g} s, with "{kind}" in flight',
        kind="stalled",
        rank=rank,
        hint="somebody sent it SIGSTOP",
    )


def as_failed(request_id: int, error: BaseException) -> tuple[Failed, bytes]:
    """Message and body for what a handler raised."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as problem:  # a __str__ that raises must not hide the failure
        text = f"{type(error).__qualname__} (cannot be shown: {type(problem).__name__})"
    if len(text) > _TEXT_LIMIT:
        text = text[: _TEXT_LIMIT // 2] + "\n...\n" + text[-_TEXT_LIMIT // 2 :]
    failed = Failed(
        id=request_id,
        type_name=f"{type(error).__module__}.{type(error).__qualname__}",
        text=_clean(text),
        message=_clean(_message(error)),
    )
    return failed, b"" if raised_by_exit(error) else _pickled(error)


def _message(error: BaseException) -> str:
    """Type and text, on one line."""
    name = type(error).__qualname__
    try:
        text = str(error)
    except Exception:
        return name
    return f"{name}: {text[:_MESSAGE_LIMIT]}" if text else name


def raised_by(failed: Failed, pickled: bytes, where: str) -> BaseException:
    """The exception to raise in the caller.

    Args:
        where: which worker it was, for the note that holds the remote traceback.
    """
    error = _unpickled(pickled)
    if error is None:
        error = WorkerFailure(f"in {where}: {failed.message}")
        error.type_name = failed.type_name
    if isinstance(error, CheckpointException) and error.failures:
        error.__cause__ = next(iter(error.failures.values()))[0]
    error.add_note(f"Traceback in {where}:\n{failed.text.rstrip()}")
    return error


def packed(error: BaseException) -> bytes:
    """As a handler tells of it before it raises it: for ``unpacked``."""
    return msgspec.msgpack.encode(as_failed(0, error))


def unpacked(data: bytes, where: str) -> BaseException:
    """What was ``packed``, as ``raised_by``."""
    failed, pickled = msgspec.msgpack.decode(data, type=tuple[Failed, bytes])
    return raised_by(failed, pickled, where)


def _pickled(error: BaseException) -> bytes:
    """Empty if the exception cannot be pickled, or would not come out as what it is."""
    try:
        travelling = _portable(error)
        data = pickle.dumps(travelling)
        if len(data) > _PICKLE_LIMIT or type(pickle.loads(data)) is not type(error):
            return b""
    except Exception:
        # Whatever went wrong in foreign code here, the text still travels.
        return b""
    return data


def _portable(error: BaseException) -> BaseException:
    """``error``, or for failures of several ranks a copy in which each can travel."""
    if not isinstance(error, CheckpointException):
        return error
    portable = copy.copy(error)
    portable._failures = {
        rank: (restore(capture(rank, failure))[0], stack)
        for rank, (failure, stack) in error.failures.items()
    }
    return portable


def _unpickled(data: bytes) -> BaseException | None:
    if not data:
        return None
    try:
        error: object = pickle.loads(data)
    except Exception:
        return None  # its class cannot be imported here: the text says the same
    return error if isinstance(error, BaseException) else None


def _clean(text: str) -> str:
    """Without lone surrogates, which no message can hold."""
    return text.encode("utf-8", "replace").decode()
