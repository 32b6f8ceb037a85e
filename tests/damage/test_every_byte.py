"""Whatever happens to a file of a checkpoint is found by name, or changes no value that is read:
every region of every file, for checkpoints of every kind, in full and in partial reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

import dcp_engine as dcp
from dcp_engine.format.names import OWNER_NAME
from tests.damage.changes import Change, changes
from tests.damage.samples import (
    SAMPLES,
    Place,
    Reading,
    Sample,
    read_full,
    read_slices,
    read_some,
    read_verify,
)

NOTHING_THERE = ("not_found", "not_committed", "incomplete")
READINGS: dict[str, Reading] = {
    "full load": read_full,
    "full verification": read_verify,
    "load of one key": read_some,
    "slices": read_slices,
}


def contents(store: Place) -> dict[str, bytes]:
    return {file.name: store.get(file.name) for file in store.list() if file.name[-1] != "/"}


def write(store: Place, files: dict[str, bytes | None]) -> None:
    for name, content in files.items():
        if content is None:
            store.delete([name])
        else:
            store.make_directory(name.rpartition("/")[0])
            store.put(name, content)


def cause(error: dcp.CheckpointError) -> BaseException:
    if isinstance(error, dcp.CheckpointException):
        return error.failures[0][0]
    return error


def unnamed(error: dcp.CheckpointError, change: Change, files: dict[str, bytes]) -> str | None:
    """What the error should say and does not."""
    first = cause(error)
    if not isinstance(first, dcp.CheckpointError):
        return "not a CheckpointError"
    if first.checkpoint is None or first.checkpoint not in str(error):
        return "no checkpoint"
    if first.kind in NOTHING_THERE:
        return None if any("manifest" in name for name in change.files) else "nothing there"
    if first.file is None and first.tensor is None:
        return "neither file nor tensor"
    in_place = change.kind not in ("swapped", "exchanged", "swapped with another checkpoint")
    if in_place and first.file not in change.files:
        return "another file"
    return None


def try_all(sample: Sample, store: Place, tried: Iterable[Change]) -> Counter[tuple[str, ...]]:
    """Make each change, read in every way, undo it. Counts by kind, reading and outcome."""
    counts: Counter[tuple[str, ...]] = Counter()
    files = contents(store)
    for number, change in enumerate(tried):
        write(store, dict(change.files))
        for label, reading in readings_of(change, number):
            for attempt in reading(store, sample):
                at = (change.kind, change.where, label)
                try:
                    right = attempt()
                except dcp.CheckpointError as error:
                    assert (lack := unnamed(error, change, files)) is None, (*at, lack, str(error))
                    outcome = "detected"
                else:
                    assert right, (*at, "silently wrong")
                    outcome = "without effect"
                    if label in ("full load", "full verification"):
                        assert is_harmless(change, sample), (*at, "not noticed")
                counts[change.kind, label, outcome] += 1
        write(store, {name: files[name] for name in change.files})
    for reading in READINGS.values():
        assert all(attempt() for attempt in reading(store, sample))
    return counts


def readings_of(change: Change, number: int) -> list[tuple[str, Reading]]:
    """A full load always; of the other ways all for changes that are few, else in turn."""
    first, *others = READINGS.items()
    if change.kind in ("flipped bit", "zeroed byte", "truncated"):
        # Shifted now and then, or each way would see the same bit of every byte.
        return [first, others[(number + number // 9) % len(others)]]
    return [first, *others]


def is_harmless(change: Change, sample: Sample) -> bool:
    """Whether a change may go unnoticed where everything is read: that of the owner record, which
    serves clean-up alone; manifests of ranks that bear each other's names, for each says whose it
    is; and what higher ranks of a save without collectives wrote although a lower one did."""
    spare = "/rank00001-00.safetensors"
    if not sample.use_collectives and all(name.endswith(spare) for name in change.files):
        return change.kind in ("flipped bit", "zeroed byte", "zeroed region")
    if all(name.endswith(f"/{OWNER_NAME}") for name in change.files):
        return True
    return change.kind == "exchanged" and all(name.startswith("manifest-") for name in change.files)


def show(name: str, counts: Counter[tuple[str, ...]]) -> None:
    print(f"\n{name}: {sum(counts.values()):,} reads of a changed checkpoint")
    for (kind, label, outcome), number in sorted(counts.items()):
        print(f"  {kind:32} {label:18} {outcome:15} {number:9,}")


@pytest.mark.parametrize("name", SAMPLES)
def test_a_change_is_found_or_harmless(name: str) -> None:
    _run(name, every=False)


@pytest.mark.torture
@pytest.mark.parametrize("name", SAMPLES)
def test_every_bit_and_every_length(name: str) -> None:
    _run(name, every=True)


def _run(name: str, *, every: bool) -> None:
    sample = SAMPLES[name]
    store, other = sample.save(0), sample.save(1)
    counts = try_all(sample, store, changes(contents(store), contents(other), every=every))
    show(name, counts)
    seen = {(kind, outcome) for kind, _, outcome in counts}
    for kind in ("flipped bit", "zeroed byte", "zeroed region", "truncated", "extended"):
        assert {(kind, "detected"), (kind, "without effect")} <= seen, kind
    for kind in ("removed", "swapped", "exchanged", "swapped with another checkpoint"):
        assert (kind, "detected") in seen, kind
