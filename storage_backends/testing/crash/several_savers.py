"""Programs that know nothing of each other on one checkpoint: two jobs, a job beside ``prune``, and
ranks that save without collectives.

Belongs here: scenarios run by ``turns.Turns``. Does not belong here: ranks that agree
(``several_ranks``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    "overwrite_shares",
    "saver_and_prune",
    "shares_first",
    "shares_over_incomplete",
    "two_first_savers",
    "two_savers",
]


def _turns(
    explorer: Explorer,
    budget: Budget,
    prepare: Callable[[Path], None],
    programs: Mapping[str, Callable[[Path], None]],
) -> None:
    """Programs that know nothing of each other, in ``budget.orders`` orders. A name is
    ``<anything>:<label>``."""
    for order in range(budget.orders):
        turns = Turns(budget.seed + order)

        def run(root: Path, recorder: Recorder, turns: Turns = turns) -> None:
            def program(name: str, work: Callable[[Path], None]) -> Callable[[], None]:
                def life() -> None:
                    with marked(recorder, name.partition(":")[2]):
                        work(root)

                return life

            turns.run([(name, program(name, work)) for name, work in programs.items()])

        explorer.explore(record_of(prepare, run, before=turns.pause, seed=1))


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

    for order in range(budget.orders):
        turns = Turns(budget.seed + order)

        def run(root: Path, recorder: Recorder, turns: Turns = turns) -> None:
            turns.run(
                [
                    ("saver", partial(save_new, root, recorder)),
                    ("prune", partial(prune, root, older_than=3600.0)),
                ]
            )

        explorer.explore(record_of(save_old, run, before=turns.pause, seed=1))
    return explorer.report()


def _shares_programs(token: str) -> Mapping[str, Callable[[Path], None]]:
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
