"""All scenarios, by name, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Mapping

from storage_backends.testing.crash.async_saves import (
    async_by_worker,
    async_overwrites,
    worker_dies,
)
from storage_backends.testing.crash.failing_saves import (
    failing_first_save,
    failing_for_good,
    failing_once,
)
from storage_backends.testing.crash.killed_saves import killed_then_next_save, killed_then_prune
from storage_backends.testing.crash.runs import Budget, Scenario
from storage_backends.testing.crash.several_ranks import (
    coordinator_dies,
    one_rank_fails,
    two_ranks_first,
    two_ranks_overwrite,
)
from storage_backends.testing.crash.several_savers import (
    neighbours,
    overwrite_shares,
    saver_and_prune,
    shares_first,
    shares_over_incomplete,
    two_first_savers,
    two_savers,
)
from storage_backends.testing.crash.single_saves import (
    crash_after_crash,
    first_save,
    keep_and_prune,
    load_beside_first_save,
    load_beside_saves,
    overwrite,
    overwrite_by_items,
    overwrite_unsynced,
    prune_orphans,
)

__all__ = ["SCENARIOS", "Budget", "Scenario"]

SCENARIOS: Mapping[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        first_save,
        overwrite,
        overwrite_by_items,
        overwrite_unsynced,
        keep_and_prune,
        prune_orphans,
        failing_once,
        failing_for_good,
        failing_first_save,
        crash_after_crash,
        killed_then_prune,
        killed_then_next_save,
        two_ranks_first,
        two_ranks_overwrite,
        one_rank_fails,
        coordinator_dies,
        two_savers,
        two_first_savers,
        neighbours,
        saver_and_prune,
        shares_first,
        shares_over_incomplete,
        overwrite_shares,
        async_overwrites,
        async_by_worker,
        worker_dies,
        load_beside_saves,
        load_beside_first_save,
    )
}
