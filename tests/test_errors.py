"""Errors say where and what next, travel between processes, and have kinds that are listed."""

from __future__ import annotations

import errno
import pickle
import traceback

import pytest

from dcp_engine import errors
from dcp_engine.errors import CheckpointError, CheckpointException, NotFoundError, StorageError

ALL = [
    value
    for name in errors.__all__
    if isinstance(value := getattr(errors, name), type) and issubclass(value, Exception)
]


@pytest.mark.parametrize("cls", ALL)
def test_every_error_is_a_checkpoint_error_with_a_listed_kind(cls: type[CheckpointError]) -> None:
    assert issubclass(cls, CheckpointError) and issubclass(cls, Exception)
    assert cls.default_kind in errors.KINDS
    assert cls("x").kind == cls.default_kind


@pytest.mark.parametrize("cls", [c for c in ALL if c is not CheckpointException])
def test_the_text_names_everything_and_survives_pickling(cls: type[CheckpointError]) -> None:
    error = cls(
        "it broke", checkpoint="/c", file="data", tensor="w.x", rank=3, hint="mend it"
    ).with_context(rank=9, file="other")
    again = pickle.loads(pickle.dumps(error))
    for one in (error, again):
        text = str(one)
        for part in (one.kind, "it broke", "/c", "data", "w.x", "rank 3", "Mend it"):
            assert part in text
        assert type(one) is cls


def test_an_os_error_keeps_its_number() -> None:
    error = StorageError("full", kind="disk_full")
    error.errno = errno.ENOSPC
    assert pickle.loads(pickle.dumps(error)).errno == errno.ENOSPC


def test_builtin_bases_are_what_handlers_expect() -> None:
    assert issubclass(NotFoundError, KeyError)
    assert issubclass(StorageError, OSError)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown error kind"):
        CheckpointError("x", kind="nonsense")


def test_the_exception_of_many_ranks_names_all_and_takes_the_first_kind() -> None:
    first = StorageError("no space", kind="disk_full", file="f")
    stack = traceback.StackSummary.from_list([("file.py", 7, "write", "os.write(...)")])
    error = CheckpointException("save failed", {2: (first, stack), 0: (ValueError("v"), stack)})
    again = pickle.loads(pickle.dumps(error))
    for one in (error, again):
        assert one.kind == "disk_full"
        assert list(one.failures) == [2, 0]
        assert "rank 2 failed with StorageError" in str(one)
        assert "rank 0 failed with ValueError: v" in str(one)
        assert "file.py" in str(one)
