"""One saver: first save, overwrite, clean-up, and a crash after a crash.

Belongs here: scenarios in which every operation works. Does not belong here: failing ones
(``failing_saves``), several savers (``several_ranks``, ``several_savers``).
"""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from storage_backends.filesystem_store import FileSystemStore
from storage_backends.prune import prune
from storage_backends.testing.crash import jobs, rules
from storage_backends.testing.crash.explorer import Report, scratch_directory, write_image
from storage_backends.testing.crash.persistence import Bounds, DiskAtPosition, choices
from storage_backends.testing.crash.readers import overtaken_loads
from storage_backends.testing.crash.recorder import Recorder
from storage_backends.testing.crash.runs import (
    Budget,
    explorer_of,
    marked,
    nothing,
    record_of,
    save_new,
    save_old,
)

__all__ = [
    "crash_after_crash",
    "first_save",
    "keep_and_prune",
    "load_beside_first_save",
    "load_beside_saves",
    "overwrite",
    "overwrite_by_items",
    "overwrite_unsynced",
    "prune_orphans",
]


def first_save(budget: Budget) -> Report:
    """Nothing is there, not even the directory."""
    explorer = explorer_of("first save", rules.one_save(jobs.NONE, "new"), budget)
    explorer.explore(record_of(nothing, save_new))
    return explorer.report()


def overwrite(budget: Budget) -> Report:
    """In place of a checkpoint, whose data goes after the commit."""
    explorer = explorer_of("overwrite in place", rules.one_save("old", "new"), budget)
    explorer.explore(record_of(save_old, save_new))
    return explorer.report()


def overwrite_by_items(budget: Budget) -> Report:
    """The same in DCP's life cycle, with a planner of one's own."""

    def run(root: Path, recorder: Recorder) -> None:
        with marked(recorder, "new"):
            jobs.save_alone(root, "new", items=True)

    explorer = explorer_of("overwrite, item by item", rules.one_save("old", "new"), budget)
    explorer.explore(record_of(save_old, run))
    return explorer.report()


def overwrite_unsynced(budget: Budget) -> Report:
    """``sync_files=False``, and only the program dies, not the machine."""

    def run(root: Path, recorder: Recorder) -> None:
        with marked(recorder, "new"):
            jobs.save_alone(root, "new", store=partial(FileSystemStore, sync=False))

    died = replace(budget, bounds=Bounds(power_fails=False))
    explorer = explorer_of("overwrite, not synced, killed", rules.one_save("old", "new"), died)
    explorer.explore(record_of(save_old, run))
    return explorer.report()


def load_beside_saves(budget: Budget) -> Report:
    """Loads that two saves, one after the other, overtake."""

    def run(root: Path, recorder: Recorder) -> None:
        for label in ("new", "other"):
            save_new(root, recorder, label=label)

    return overtaken_loads(
        "loads beside saves", record_of(save_old, run), loads=budget.loads, seed=budget.seed
    )


def load_beside_first_save(budget: Budget) -> Report:
    """Loads that begin before there is anything."""
    return overtaken_loads(
        "loads beside a first save",
        record_of(nothing, save_new),
        loads=budget.loads // 2,
        seed=budget.seed,
    )


def keep_and_prune(budget: Budget) -> Report:
    """The replaced data stays, until ``prune``."""

    def run(root: Path, recorder: Recorder) -> None:
        with marked(recorder, "new"):
            jobs.save_alone(root, "new", keep_replaced=True)
        prune(root, older_than=-1.0)

    explorer = explorer_of("overwrite, keep_replaced, prune", rules.one_save("old", "new"), budget)
    explorer.explore(record_of(save_old, run))
    return explorer.report()


def prune_orphans(budget: Budget) -> Report:
    """``prune`` beside a checkpoint: what crashed saves left, one of them without collectives."""

    def prepare(root: Path) -> None:
        path, aside = root / jobs.CHECKPOINT, root / "aside"
        for seed, save in enumerate(
            (
                partial(jobs.save_alone, aside, "other"),
                partial(jobs.save_share, aside, "other", 0, 2, "c" * 32),
            ),
            1,
        ):
            aside.mkdir()
            with jobs.frozen(seed):
                save()
            if seed == 1:
                (aside / jobs.CHECKPOINT / "manifest.json").unlink()
            shutil.copytree(aside / jobs.CHECKPOINT, path, dirs_exist_ok=True)
            shutil.rmtree(aside)
        # The checkpoint itself comes last, as it would hide and remove the rest.
        aside.mkdir()
        jobs.save_alone(aside, "old")
        shutil.copytree(aside / jobs.CHECKPOINT, path, dirs_exist_ok=True)
        shutil.rmtree(aside)

    def run(root: Path, recorder: Recorder) -> None:
        report = prune(root, older_than=-1.0)
        if len(report.removed) != 2:
            raise AssertionError(f"this was to prune two directories: {report}")

    explorer = explorer_of("prune", rules.always("old"), budget)
    explorer.explore(record_of(prepare, run))
    return explorer.report()


def crash_after_crash(budget: Budget) -> Report:
    """A save on what a crash left, crashed again."""
    generator = random.Random(f"{budget.seed} starts")
    first = record_of(save_old, save_new)
    total = explorer_of("crash, next save, crash", rules.always("-"), budget)
    for _ in range(budget.starts):
        disk = DiskAtPosition(first)
        for step in first.steps[: generator.randrange(len(first.steps))]:
            disk.advance(step.operation)
        kept = generator.choice(list(choices(disk.pending, budget.bounds, generator)))
        image = disk.image(kept)
        with scratch_directory() as root:
            write_image(image, root)
            found = jobs.read(root)
        record = record_of(
            lambda root, image=image: write_image(image, root),  # type: ignore[misc]
            partial(save_new, label="other"),
            seed=1,
        )
        total.explore(record, allowed=rules.one_save(found, "other"))
    return total.report()
