"""The persistence model: what a crash may leave of small records written by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from storage_backends.testing.crash.operations import (
    ROOT,
    Create,
    Image,
    Link,
    MakeDirectory,
    Mark,
    Operation,
    Record,
    RemoveDirectory,
    Rename,
    Step,
    Sync,
    SyncAll,
    SyncFailed,
    Truncate,
    Unlink,
    Write,
)
from storage_backends.testing.crash.persistence import BLOCK, Bounds, DiskAtPosition, choices

ALL = Bounds(exhaustive=14)
F, D = 1, 2
A, B = b"a" * BLOCK, b"b" * BLOCK


def images(*operations: Operation, files: dict[int, bytes] | None = None) -> list[Image]:
    """Every tree that a crash after ``operations`` may leave; ``files`` are there before."""
    disk = DiskAtPosition(record(operations, files))
    for operation in operations:
        disk.advance(operation)
    kept = list(choices(disk.pending, ALL, random.Random(0)))
    assert len(kept) == 2**disk.pending
    return [disk.image(choice) for choice in kept]


def record(operations: Sequence[Operation], files: dict[int, bytes] | None = None) -> Record:
    held = files or {}
    return Record(
        files=held,
        entries={(ROOT, f"file{node}"): node for node in held},
        steps=tuple(Step(operation, "me") for operation in operations),
    )


def contents(found: Sequence[Image], name: str) -> set[bytes | None]:
    return {image.files.get(name) for image in found}


def test_a_new_file_may_be_missing_empty_short_torn_or_whole() -> None:
    found = images(Create(ROOT, "f", F), Write(F, 0, A + B))
    assert contents(found, "f") == {
        None,
        b"",
        A,
        bytes(BLOCK) + B,
        A + bytes(BLOCK),
        bytes(2 * BLOCK),
        A + B,
    }


def test_fsync_of_a_file_keeps_its_bytes_but_not_its_name() -> None:
    found = images(Create(ROOT, "f", F), Write(F, 0, A + B), Sync(F))
    assert contents(found, "f") == {None, A + B}


def test_fsync_of_the_directory_keeps_the_name_but_not_the_bytes() -> None:
    found = images(Create(ROOT, "f", F), Write(F, 0, A), Sync(ROOT))
    assert contents(found, "f") == {b"", bytes(BLOCK), A}


def test_both_keep_all() -> None:
    operations = [Create(ROOT, "f", F), Write(F, 0, A), Sync(F), Sync(ROOT)]
    assert contents(images(*operations), "f") == {A}
    assert contents(images(*operations[:2], SyncAll()), "f") == {A}


def test_what_was_written_after_the_fsync_may_be_lost_alone() -> None:
    found = images(
        Create(ROOT, "f", F), Write(F, 0, A), Sync(F), Sync(ROOT), Write(F, BLOCK - 2, b"xyz")
    )
    assert contents(found, "f") == {
        A,
        A[:-2] + b"xy",
        A + b"\0",
        A[:-2] + b"xy\0",
        A + b"z",
        A[:-2] + b"xyz",
    }


def test_a_write_over_old_bytes_may_leave_a_mixture_of_blocks() -> None:
    found = images(Write(F, 0, B + B), files={F: A + A})
    assert contents(found, "file1") == {A + A, A + B, B + A, B + B}


def test_a_truncation_may_be_lost_or_not() -> None:
    assert contents(images(Truncate(F, 0), files={F: A}), "file1") == {A, b""}
    assert contents(images(Truncate(F, 0), Sync(F), files={F: A}), "file1") == {b""}
    assert contents(images(Truncate(F, BLOCK + 1), files={F: A}), "file1") == {A, A + b"\0"}


def test_names_change_in_any_order() -> None:
    found = images(Create(ROOT, "f", F), Create(ROOT, "g", 3), Unlink(ROOT, "f"))
    assert {frozenset(image.files) for image in found} == {
        frozenset(),
        frozenset({"f"}),
        frozenset({"g"}),
        frozenset({"f", "g"}),
    }


def test_a_rename_moves_as_one() -> None:
    found = images(Rename(ROOT, "file1", ROOT, "file3"), files={F: A, 3: B})
    assert {tuple(sorted(image.files.items())) for image in found} == {
        (("file1", A), ("file3", B)),
        (("file3", A),),
    }


@pytest.mark.parametrize("synced", [ROOT, D])
def test_a_rename_is_durable_by_either_directory(synced: int) -> None:
    """The file was created in a directory whose entries are not durable: it does not come back
    under its first name after the rename is."""
    found = images(
        MakeDirectory(ROOT, "d", D),
        Sync(ROOT),
        Create(D, "f", F),
        Write(F, 0, A),
        Sync(F),
        Rename(D, "f", ROOT, "g"),
        Sync(synced),
    )
    assert {tuple(image.files.items()) for image in found} == {(("g", A),)}


def test_what_is_in_a_directory_is_lost_with_it() -> None:
    found = images(MakeDirectory(ROOT, "d", D), Create(D, "f", F), Sync(F), Sync(D))
    assert {tuple(image.files) for image in found} == {(), ("d/f",)}
    assert {tuple(sorted(image.directories)) for image in found} == {(), ("d",)}
    gone = images(
        MakeDirectory(ROOT, "d", D),
        Create(D, "f", F),
        SyncAll(),
        Unlink(D, "f"),
        RemoveDirectory(ROOT, "d"),
    )
    assert {(tuple(i.files), tuple(i.directories)) for i in gone} == {
        (("d/f",), ("d",)),
        ((), ("d",)),
        ((), ()),
    }


def test_a_link_gives_a_second_name() -> None:
    found = images(Link(ROOT, "g", F), Unlink(ROOT, "file1"), files={F: A})
    assert {tuple(sorted(image.files.items())) for image in found} == {
        (("file1", A),),
        (("file1", A), ("g", A)),
        (("g", A),),
        (),
    }


def test_what_a_failed_fsync_lost_no_later_one_brings_back() -> None:
    found = images(
        Create(ROOT, "f", F), Sync(ROOT), Write(F, 0, A), SyncFailed(F), Sync(F), Sync(F)
    )
    assert contents(found, "f") == {b"", bytes(BLOCK), A}
    again = images(
        Create(ROOT, "f", F), Sync(ROOT), Write(F, 0, A), SyncFailed(F), Write(F, 0, B), Sync(F)
    )
    assert contents(again, "f") == {B}


def test_the_whole_is_what_the_running_system_sees() -> None:
    operations = [Create(ROOT, "f", F), Write(F, 0, A), Mark("here"), Truncate(F, 5)]
    disk = DiskAtPosition(record(operations))
    for operation in operations:
        disk.advance(operation)
    assert disk.whole().files == {"f": b"aaaaa"}


def test_choices_beyond_the_bound() -> None:
    bounds = Bounds(exhaustive=3, pairs=8, random=5)
    few = list(choices(3, bounds, random.Random(1)))
    assert sorted(map(sorted, few)) == [[], [0], [0, 1], [0, 1, 2], [0, 2], [1], [1, 2], [2]]
    many = list(choices(8, bounds, random.Random(1)))
    everything = frozenset(range(8))
    assert many[:2] == [everything, frozenset()]
    assert len(set(many)) == len(many)
    for unit in range(8):
        assert everything - {unit} in many
        assert frozenset({unit}) in many
        assert frozenset(range(unit)) in many
        assert frozenset(range(unit, 8)) in many
    assert everything - {2, 5} in many
    assert many == list(choices(8, bounds, random.Random(1)))


def test_only_the_program_dies() -> None:
    bounds = Bounds(power_fails=False)
    assert list(choices(4, bounds, random.Random(0))) == [frozenset(range(4))]
