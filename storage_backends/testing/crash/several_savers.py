"""Programs that know nothing of each other on one checkpoint: two jobs, a job beside ``prune``, and
ranks that save without collectives.

Belongs here: scenarios run by ``turns.Turns``. Does not belong here: ranks that agree
(``several_ranks``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from storage_backends.prune import prune
from storage_backends.testing.crash import jobs, rules
from storage_backends.testing.crash.explorer import Explorer, Report
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
from storage_backends.testing.crash.turns import Turns

__all__ = [
    "neighbours",
    "overwrite_shares",
    "saver_and_prune",
    "shares_first",
    "shares_over_incomplete",
    "two_first_savers",
    "two_savers",
]


Programs = Mapping[str, Callable[[Path], object]]
"""What to run, by name. How a program called ``<anything>:<label>`` ends is marked: it saves that
label."""


def _turns(
    explorer: Explorer,
    budget: Budget,
    prepare: Callable[[Path], None],
    programs: Programs,
) -> None:
    """Programs that know nothing of each other, in orders drawn by chance, and with the first of
    them overtaken at one place."""
    schedules = [Turns(budget.seed + number) for number in range(budget.orders)]
    schedules += [Turns(0, ahead=number) for number in budget.overtaken]
    for turns in schedules:
        run = partial(_run, turns=turns, programs=programs)
        explorer.explore(record_of(prepare, run, before=turns.pause, seed=1))


def _run(root: Path, recorder: Recorder, *, turns: Turns, programs: Programs) -> None:
    def life(name: str, work: Callable[[Path], object]) -> None:
        label = name.partition(":")[2]
        with marked(recorder, label) if label else nullcontext():
            work(root)

    turns.run([(name, partial(life, name, work)) for name, work in programs.items()])


def two_savers(budget: Budget) -> Report:
    """Two jobs save to one place at once, over a checkpoint: one of them, or the other."""
    explorer = explorer_of(
        "two savers, overwrite", rules.one_of_several("old", ["new", "other"]), budget
    )
    programs = {
        f"saver:{label}": partial(jobs.save_alone, label=label) for label in ("new", "other")
    }
    _turns(explorer, budget, save_old, programs)
    return explorer.report()


def two_first_savers(budget: Budget) -> Report:
    """The same where nothing is there."""
    explorer = explorer_of(
        "two savers, first save", rules.one_of_several(jobs.NONE, ["new", "other"]), budget
    )
    programs = {
        f"saver:{label}": partial(jobs.save_alone, label=label) for label in ("new", "other")
    }
    _turns(explorer, budget, nothing, programs)
    return explorer.report()


def saver_and_prune(budget: Budget) -> Report:
    """``prune`` while a save is running, which it takes for alive."""
    explorer = explorer_of("a save beside prune", rules.one_save("old", "new"), budget)
    programs: Programs = {
        "saver:new": partial(jobs.save_alone, label="new"),
        "prune": partial(prune, older_than=3600.0),
    }
    _turns(explorer, budget, save_old, programs)
    return explorer.report()


def neighbours(budget: Budget) -> Report:
    """Two jobs save to two places below one directory that neither finds there."""
    explorer = explorer_of("two savers, one new parent", rules.one_save(jobs.NONE, "new"), budget)
    saver = {"saver:new": partial(jobs.save_alone, label="new")}
    neighbour = {"neighbour": partial(jobs.save_alone, label="other", place="runs/step-2")}
    _turns(explorer, budget, nothing, {**saver, **neighbour})
    _turns(explorer, budget, nothing, {**neighbour, **saver})
    return explorer.report()


def _shares_programs(token: str) -> Programs:
    return {
        f"rank {rank}:new": partial(
            jobs.save_share, label="new", rank=rank, world_size=2, token=token
        )
        for rank in range(2)
    }


def shares_first(budget: Budget) -> Report:
    """Two ranks without a word between them: the checkpoint is there when both are done."""
    explorer = explorer_of(
        "no collectives, first save",
        rules.shares(jobs.NONE, "new", 2),
        budget,
        partial(jobs.read, ranks=True),
    )
    _turns(explorer, budget, nothing, _shares_programs("a" * 32))
    return explorer.report()


def shares_over_incomplete(budget: Budget) -> Report:
    """The same over what one rank of a save that never ended left."""

    def prepare(root: Path) -> None:
        jobs.save_share(root, "other", 1, 2, "b" * 32)

    explorer = explorer_of(
        "no collectives, second token",
        rules.shares(jobs.NONE, "new", 2),
        budget,
        partial(jobs.read, ranks=True),
    )
    _turns(explorer, budget, prepare, _shares_programs("a" * 32))
    return explorer.report()


def overwrite_shares(budget: Budget) -> Report:
    """A save with collectives over a checkpoint that was made without."""

    def prepare(root: Path) -> None:
        for rank in range(2):
            jobs.save_share(root, "old", rank, 2, "a" * 32)

    explorer = explorer_of("overwrite of a set of manifests", rules.one_save("old", "new"), budget)
    explorer.explore(record_of(prepare, save_new))
    return explorer.report()
