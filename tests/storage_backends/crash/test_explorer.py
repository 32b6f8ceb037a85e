"""The explorer finds planted faults, each known mistake of writers of files among them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from dcp_engine.storage import ByteStore
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.testing.crash import (
    Bounds,
    Explorer,
    Recorder,
    Report,
    Turns,
    always,
    interleavings,
    one_after_another,
    one_of_several,
    one_save,
    shares,
)
from storage_backends.testing.crash.jobs import CHECKPOINT, frozen, read, save_alone
from storage_backends.testing.crash.operations import Mark, Record, Step
from storage_backends.testing.crash.runs import record_of, save_old
from storage_backends.testing.wrapping import WrappingByteStore

T = TypeVar("T")
KILLED = Bounds(power_fails=False)
FEW = Bounds(exhaustive=3, pairs=0, random=2)


def explored(record: Record, reader: Callable[[Path], str], bounds: Bounds | None = None) -> Report:
    explorer = Explorer("x", reader=reader, allowed=one_save("old", "new"), bounds=bounds)
    explorer.explore(record)
    return explorer.report()


# How one small file is replaced


def word(root: Path) -> str:
    try:
        return (root / "f").read_text()
    except FileNotFoundError:
        return "none"


def replace_file(root: Path, recorder: Recorder, leave_out: str = "") -> None:
    """The right way, but for what is left out."""
    directory = os.open(root, os.O_RDONLY)
    descriptor = os.open(root / "f.tmp", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"new")
    if leave_out != "fsync of the file":
        os.fsync(descriptor)
    os.close(descriptor)
    if leave_out == "the temporary name":
        (root / "f").unlink()
    os.rename(root / "f.tmp", root / "f")
    if leave_out != "fsync of the directory":
        os.fsync(directory)
    os.close(directory)
    recorder.mark("returned:new")


def file_before(root: Path) -> None:
    (root / "f").write_text("old")


def test_a_file_that_is_replaced_in_the_right_way() -> None:
    report = explored(record_of(file_before, replace_file), word)
    assert not report.violations
    assert set(report.outcomes) == {"old", "new"}
    assert (report.operations, report.durable_points, report.runs) == (5, 2, 1)


@pytest.mark.parametrize(
    ("left_out", "found"),
    [
        ("fsync of the file", {""}),
        ("fsync of the directory", {"old"}),
        ("the temporary name", {"none"}),
    ],
)
def test_a_file_that_is_replaced_in_a_wrong_way(left_out: str, found: set[str]) -> None:
    report = explored(record_of(file_before, partial(replace_file, leave_out=left_out)), word)
    assert {violation.found for violation in report.violations} >= found
    assert all(violation.found not in violation.allowed for violation in report.violations)
    texts = [str(violation) for violation in report.violations]
    assert all("after step" in text and "right would be" in text for text in texts)


def test_a_kill_alone_does_not_show_what_was_not_synced() -> None:
    record = record_of(file_before, partial(replace_file, leave_out="fsync of the file"))
    assert not explored(record, word, KILLED).violations
    record = record_of(file_before, partial(replace_file, leave_out="the temporary name"))
    assert explored(record, word, KILLED).violations


# The engine over stores that do not keep their promises


class Skipping(WrappingByteStore):
    """Says that it synced, and did not."""

    def __init__(self, path: Path, operation: str) -> None:
        super().__init__(FileSystemStore(path))
        self._operation = operation

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        return None if operation == self._operation else call()  # type: ignore[return-value]


class Copying(FileSystemStore):
    """Replaces by copying over."""

    def replace(self, source: str, target: str) -> None:
        root = Path(self.url)
        data = (root / source).read_bytes()
        descriptor = os.open(root / target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)
        (root / source).unlink()


class TidyingFirst(FileSystemStore):
    """Makes room before the new checkpoint is there."""

    def replace(self, source: str, target: str) -> None:
        for path in Path(self.url).glob("data-*"):
            if not source.startswith(path.name):
                shutil.rmtree(path)
        super().replace(source, target)


class Exchanging(FileSystemStore):
    """Takes the old manifest away, and then gives its name to the new one."""

    def replace(self, source: str, target: str) -> None:
        (Path(self.url) / target).unlink()
        super().replace(source, target)


MUTANTS: dict[str, Callable[[Path], ByteStore]] = {
    "no fsync at all": partial(FileSystemStore, sync=False),
    "no fsync of files": partial(Skipping, operation="sync"),
    "no fsync of directories": partial(Skipping, operation="sync_directory"),
    "a copy instead of a rename": Copying,
    "clean-up before the commit": TidyingFirst,
    "the old manifest removed first": Exchanging,
}
SEEN_BY_A_KILL = {
    "a copy instead of a rename",
    "clean-up before the commit",
    "the old manifest removed first",
}


def overwrite(store: Callable[[Path], ByteStore]) -> Record:
    def run(root: Path, recorder: Recorder) -> None:
        save_alone(root, "new", store=store)
        recorder.mark("returned:new")

    return record_of(save_old, run)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_store_that_breaks_its_promise_is_found(name: str) -> None:
    record = overwrite(MUTANTS[name])
    assert explored(record, read, FEW).violations
    assert bool(explored(record, read, KILLED).violations) == (name in SEEN_BY_A_KILL)


def test_the_store_itself_keeps_them() -> None:
    assert not explored(overwrite(FileSystemStore), read, FEW).violations


# Counting, seeds, rules


def test_the_same_seed_finds_the_same() -> None:
    def once() -> Report:
        record = overwrite(FileSystemStore)
        explorer = Explorer("x", reader=read, allowed=one_save("old", "new"), bounds=FEW, seed=3)
        explorer.explore(record)
        return explorer.report()

    assert once() == once()


def test_a_next_save_is_tried_and_its_failure_is_a_violation() -> None:
    tried: list[str] = []

    def next_save(root: Path, found: str) -> str | None:
        tried.append(found)
        return None if found == "new" else "nobody can save"

    explorer = Explorer(
        "x",
        reader=word,
        allowed=one_save("old", "new"),
        follow_up=next_save,
        follow_every=1,
    )
    explorer.explore(record_of(file_before, replace_file))
    report = explorer.report()
    assert report.followed == report.images == len(tried)
    assert {v.found for v in report.violations} == {"old, then nobody can save"}


def test_reports_add_up() -> None:
    one = explored(record_of(file_before, replace_file), word)
    both = Report.total([one, one])
    assert both.states == 2 * one.states
    assert both.outcomes["new"] == 2 * one.outcomes["new"]
    assert str(both.states) in both.row()


def test_rules() -> None:
    assert one_save("old", "new")([]) == {"old", "new"}
    assert one_save("old", "new")(["doubt:new"]) == {"old", "new"}
    assert one_save("old", "new")(["returned:new"]) == {"new"}
    assert one_save("old", "new")(["failed:new"]) == {"old"}
    several = one_of_several("old", ["a", "b"])
    assert several([]) == {"old", "a", "b"}
    assert several(["failed:a"]) == {"old", "b"}
    assert several(["failed:a", "returned:b"]) == {"b"}
    after = one_after_another(["old", "a", "b"])
    assert after([]) == {"old", "a", "b"}
    assert after(["returned:a"]) == {"a", "b"}
    assert after(["returned:a", "returned:b"]) == {"b"}
    assert shares("none", "new", 2)(["returned:new"]) == {"none", "new"}
    assert shares("none", "new", 2)(["returned:new"] * 2) == {"new"}
    assert always("old")(["returned:new"]) == {"old"}


# Turns


def in_turns(seed: int, ahead: int | None = None) -> list[str]:
    order: list[str] = []
    turns = Turns(seed, ahead=ahead)

    def program(name: str) -> Callable[[], None]:
        def life() -> None:
            for _ in range(5):
                turns.pause()
                order.append(name)

        return life

    turns.run([(name, program(name)) for name in "abc"])
    return order


def test_turns_depend_on_the_seed_alone() -> None:
    assert sorted(in_turns(0)) == sorted("abc" * 5)
    assert in_turns(0) == in_turns(0)
    assert len({tuple(in_turns(seed)) for seed in range(10)}) == 10


@pytest.mark.parametrize("ahead", range(8))
def test_the_first_is_overtaken_at_any_place(ahead: int) -> None:
    """Its first turn ends before its first step."""
    before = min(max(ahead - 1, 0), 5)
    rest = "b" * 5 + "c" * 5
    assert "".join(in_turns(0, ahead)) == "a" * before + rest + "a" * (5 - before)


def test_an_error_in_a_turn_is_raised() -> None:
    turns = Turns(0)

    def fail() -> None:
        turns.pause()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        turns.run([("one", fail), ("two", turns.pause)])


def test_interleavings_wait_for_signals() -> None:
    steps = [
        *(Step(Mark(text), "a") for text in ("a1", "signal:go", "await:done", "a2")),
        *(Step(Mark(text), "b") for text in ("b1", "await:go", "b2", "signal:done", "b3")),
    ]
    seen = set()
    for order in interleavings(steps, 40, seed=1):
        texts = [step.operation.text for step in order if isinstance(step.operation, Mark)]
        assert sorted(texts) == sorted(
            ["a1", "signal:go", "await:done", "a2", "b1", "await:go", "b2", "signal:done", "b3"]
        )
        assert texts.index("signal:go") < texts.index("await:go") < texts.index("b2")
        assert texts.index("signal:done") < texts.index("await:done") < texts.index("a2")
        assert [text for text in texts if text.startswith("b")] == ["b1", "b2", "b3"]
        seen.add(tuple(texts))
    assert len(seen) > 3
    again = [list(order) for order in interleavings(steps, 3, seed=1)]
    assert again == [list(order) for order in interleavings(steps, 3, seed=1)]


def test_frozen_names_are_the_same_each_time(tmp_path: Path) -> None:
    names = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        with frozen(5):
            save_alone(tmp_path / place, "new")
        names.append(sorted(os.listdir(tmp_path / place / CHECKPOINT)))
    assert names[0] == names[1]
