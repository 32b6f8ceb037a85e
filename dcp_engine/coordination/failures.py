"""Exceptions on their way from one rank to the others.

Belongs here: turning an exception into bytes and back, telling first causes from consequences,
and building the ``CheckpointException`` that every rank raises. Does not belong here: the
messages that carry the bytes.

An exception travels pickled if that is known to work, with its text beside it in case it does not
work at the other end; among ranks of one job pickle is no new risk. What cannot be pickled arrives
as a ``CoordinationError`` of kind ``rank_failed`` that carries the formatted traceback.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterable, Sequence

import msgspec

from dcp_engine.errors import (
    CheckpointError,
    CheckpointException,
    CoordinationError,
    WrappedException,
)

__all__ = [
    "FailureRecord",
    "bounded",
    "capture",
    "exception_of",
    "is_consequence",
    "raised_by_exit",
    "restore",
    "silent_rank",
]

_PICKLE_LIMIT = 1 << 20  # an exception that drags tensors along travels as text
_TEXT_LIMIT = 64 << 10


class FailureRecord(msgspec.Struct, frozen=True, array_like=True):
    """One rank's failure, as it travels."""

    rank: int
    pickled: bytes
    """Empty if the exception cannot be pickled."""
    text: str
    """The formatted traceback."""
    frames: list[tuple[str, int, str, str]]
    """File, line number, function and source line, the outermost call first."""
    consequence: bool
    """The rank stopped because of another rank's failure."""


def is_consequence(exception: BaseException) -> bool:
    """Whether a rank raised this because another one failed."""
    return isinstance(exception, CoordinationError) and exception.kind == "interrupted"


def raised_by_exit(exception: BaseException) -> bool:
    """Whether this is to be raised again on its own rank."""
    return isinstance(exception, KeyboardInterrupt | SystemExit | GeneratorExit)


def capture(
    rank: int,
    exception: BaseException,
    *,
    skip_frames: int = 0,
    consequence: bool = False,
) -> FailureRecord:
    """Make ``exception`` of ``rank`` ready to travel.

    Args:
        rank: rank in the operation's group.
        exception: as caught; its traceback is kept as text.
        skip_frames: outermost frames to leave out.
        consequence: the rank stopped only because another one failed.
    """
    if isinstance(exception, CheckpointError):
        exception.with_context(rank=rank)
    stack = _stack(exception, skip_frames)
    try:
        text = "".join(traceback.format_exception(exception))
    except Exception as error:  # a __str__ that raises must not hide the failure
        text = f"{type(exception).__qualname__} (cannot be shown: {type(error).__name__})"
    if len(text) > _TEXT_LIMIT:
        text = text[: _TEXT_LIMIT // 2] + "\n...\n" + text[-_TEXT_LIMIT // 2 :]
    return FailureRecord(
        rank=rank,
        pickled=_pickled(exception),
        text=text.encode("utf-8", "replace").decode(),
        frames=[(f.filename, f.lineno or 0, f.name, f.line or "") for f in stack],
        consequence=consequence,
    )


def _stack(exception: BaseException, skip_frames: int) -> traceback.StackSummary:
    frames = traceback.extract_tb(exception.__traceback__)
    return traceback.StackSummary.from_list(frames[skip_frames:])


def _pickled(exception: BaseException) -> bytes:
    try:
        data = pickle.dumps(exception)
        if len(data) > _PICKLE_LIMIT:
            return b""
        copy = pickle.loads(data)
        if type(copy) is not type(exception):
            return b""
        cause = exception.__cause__ or (
            None if exception.__suppress_context__ else exception.__context__
        )
        if cause is None:
            return data
        # pickle drops the chain; the other ranks get it as a note
        copy.add_note(f"caused by {type(cause).__name__}: {cause}")
        return pickle.dumps(copy)
    except Exception:
        # Whatever went wrong in foreign code here, the text still travels.
        return b""


def restore(record: FailureRecord) -> WrappedException:
    """The exception and its stack, as far as they could travel."""
    stack = traceback.StackSummary.from_list(
        [
            traceback.FrameSummary(file, number, name, lookup_line=False, line=line)
            for file, number, name, line in record.frames
        ]
    )
    exception: object = None
    if record.pickled:
        try:
            exception = pickle.loads(record.pickled)
        except Exception:
            exception = None  # its class is not importable here: the text says the same
    if not isinstance(exception, BaseException):
        exception = CoordinationError(
            f"the exception of rank {record.rank} could not be sent; its text:\n{record.text}",
            kind="rank_failed",
            rank=record.rank,
        )
    return exception, stack


def silent_rank(rank: int, message: str, kind: str) -> FailureRecord:
    """The failure of a rank that does not answer, on its behalf."""
    return capture(rank, CoordinationError(message, kind=kind, rank=rank))


def bounded(records: Sequence[FailureRecord], limit: int = 3 << 20) -> list[FailureRecord]:
    """The records, shortened from the end so that all together stay near ``limit`` bytes: a
    thousand ranks may fail at once, and the store takes 8 MiB."""
    kept: list[FailureRecord] = []
    size = 0
    for record in records:
        size += len(record.pickled) + len(record.text) + 100 * len(record.frames)
        if size > limit:
            size -= len(record.pickled) + len(record.text) + 100 * len(record.frames)
            size += 200
            record = FailureRecord(
                rank=record.rank,
                pickled=b"",
                text=record.text[-200:],
                frames=[],
                consequence=record.consequence,
            )
        kept.append(record)
    return kept


def exception_of(
    records: Iterable[FailureRecord],
    *,
    doing: str,
    checkpoint: str,
    message: str | None = None,
    kind: str | None = None,
    local: tuple[int, BaseException] | None = None,
    hint: str | None = None,
) -> CheckpointException:
    """The one exception that every rank raises.

    Args:
        records: failures in the order in which they were seen.
        doing: what the ranks were doing, for the message.
        checkpoint: checkpoint id.
        message: instead of one built from the failed ranks.
        kind: instead of the first cause's.
        local: this rank and what it raised itself; kept as the exception it is (with its
            traceback), and added behind the others if nobody knows of it.
        hint: what to do next.
    """
    ordered = sorted(records, key=lambda record: record.consequence)
    failures: dict[int, WrappedException] = {}
    for record in ordered:
        if record.rank not in failures:
            failures[record.rank] = restore(record)
    if kind is None and failures:
        # Of what the coordinator saw, before this rank puts its own in: the same on all ranks.
        first = next(iter(failures.values()))[0]
        kind = first.kind if isinstance(first, CheckpointError) else None
    if local is not None:
        rank, exception = local
        if rank in failures:
            failures[rank] = (exception, failures[rank][1])
        elif not is_consequence(exception):
            failures[rank] = (exception, _stack(exception, skip_frames=1))
    ranks = list(failures)
    if message is None:
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_some(ranks)}"
        message = f"{doing} failed on {who}"
    error = CheckpointException(message, failures, kind=kind, checkpoint=checkpoint, hint=hint)
    if ranks:
        error.__cause__ = failures[ranks[0]][0]
    return error


def _some(ranks: Sequence[int], limit: int = 16) -> str:
    shown = ", ".join(map(str, ranks[:limit]))
    return f"[{shown}]" if len(ranks) <= limit else f"[{shown}, ...] ({len(ranks)} in all)"
