"""Exceptions on their way to other ranks."""

from __future__ import annotations

import pytest

from dcp_engine.coordination.failures import (
    FailureRecord,
    bounded,
    capture,
    exception_of,
    is_consequence,
    restore,
    silent_rank,
)
from dcp_engine.coordination.messages import FailureVerdict, decode, encode
from dcp_engine.errors import CoordinationError, StorageError
from tests.coordination.cases import Poisoned, Unpicklable


class Rude(Exception):
    """Cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    def __reduce__(self) -> tuple[object, ...]:
        raise RuntimeError("no pickle")


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def travelled(error: BaseException, rank: int = 3) -> tuple[BaseException, list[str]]:
    sent = FailureVerdict(records=[capture(rank, raised(error))])
    record = decode(encode(sent), FailureVerdict).records[0]
    exception, stack = restore(record)
    return exception, [frame.name for frame in stack]


def test_an_ordinary_exception_arrives_as_it_is() -> None:
    exception, frames = travelled(KeyError("k", 1))
    assert (type(exception), exception.args, frames) == (KeyError, ("k", 1), ["raised"])


def test_the_engines_own_keep_their_fields_and_get_the_rank() -> None:
    exception, _ = travelled(StorageError("no space", kind="disk_full", file="f", hint="free it"))
    assert isinstance(exception, StorageError)
    assert (exception.kind, exception.file, exception.rank) == ("disk_full", "f", 3)


@pytest.mark.parametrize("error", [Unpicklable("locked"), Poisoned("bad", "blood"), Rude()])
def test_what_cannot_be_pickled_arrives_as_text(error: Exception) -> None:
    exception, frames = travelled(error)
    assert isinstance(exception, CoordinationError)
    assert (exception.kind, exception.rank, frames) == ("rank_failed", 3, ["raised"])
    assert type(error).__name__ in str(exception)


def test_a_class_that_is_unknown_here_arrives_as_text() -> None:
    record = capture(0, raised(ValueError("text that is kept")))
    broken = FailureRecord(
        rank=0, pickled=b"cnowhere\nNothing\n.", text=record.text, frames=[], consequence=False
    )
    exception, _ = restore(broken)
    assert isinstance(exception, CoordinationError)
    assert "text that is kept" in str(exception)


def test_the_cause_arrives_as_a_note() -> None:
    try:
        try:
            raise OSError("disk on fire")
        except OSError as cause:
            raise ValueError("cannot write") from cause
    except ValueError as error:
        exception, _ = travelled(error)
    assert exception.__notes__ == ["caused by OSError: disk on fire"]


def test_text_that_is_no_unicode_arrives() -> None:
    exception, _ = travelled(Unpicklable("half \ud800 a pair"))
    assert "half" in str(exception)


def test_a_thousand_failures_fit_into_the_store() -> None:
    records = [capture(rank, raised(ValueError("x" * 20_000))) for rank in range(1000)]
    kept = bounded(records)
    assert [record.rank for record in kept] == list(range(1000))
    assert len(encode(FailureVerdict(records=kept))) < 4 << 20
    assert kept[0] == records[0]


def test_first_causes_come_before_consequences() -> None:
    interrupted = raised(CoordinationError("stopped", kind="interrupted"))
    assert is_consequence(interrupted)
    error = exception_of(
        [
            capture(0, interrupted, consequence=True),
            capture(2, raised(StorageError("full", kind="disk_full"))),
            capture(1, raised(ValueError("late"))),
        ],
        doing="save",
        checkpoint="c",
    )
    assert list(error.failures) == [2, 1, 0]
    assert error.kind == "disk_full"
    assert error.__cause__ is error.failures[2][0]


def test_the_own_exception_is_kept_as_the_object_it_is() -> None:
    own = raised(Unpicklable("mine"))
    error = exception_of([capture(1, own)], doing="save", checkpoint="c", local=(1, own))
    assert error.failures[1][0] is own
    unknown = exception_of(
        [silent_rank(2, "gone", "stalled")], doing="save", checkpoint="c", local=(1, own)
    )
    assert list(unknown.failures) == [2, 1]
    stopped = raised(CoordinationError("stopped", kind="interrupted"))
    silent = exception_of([], doing="save", checkpoint="c", kind="store_lost", local=(1, stopped))
    assert (silent.failures, silent.kind) == ({}, "store_lost")


def test_many_ranks_are_named_in_short() -> None:
    records = [capture(rank, raised(ValueError())) for rank in range(40)]
    text = exception_of(records, doing="save", checkpoint="c").message
    assert text.endswith("15, ...] (40 in all)")
