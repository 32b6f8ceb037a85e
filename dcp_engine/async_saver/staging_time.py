"""How long staging may take: the wait for memory, and the copy.

Belongs here: its deadline, which is that of the save or of its phase ``staging``. Does not belong
here: staging.
"""

from __future__ import annotations

import time
from concurrent.futures import wait

from dcp_engine.async_saver.job import SaveJob
from dcp_engine.async_saver.snapshot import Snapshot
from dcp_engine.errors import CoordinationError, StagingError
from dcp_engine.staging.arena_stager import no_check
from dcp_engine.storage import Check

__all__ = ["await_staging", "deadline_of_staging"]


def _limit(job: SaveJob) -> float | None:
    """Seconds."""
    deadlines = job.options.deadlines
    limits = [deadlines.timeout, deadlines.phases.get("staging")]
    return min((limit for limit in limits if limit is not None), default=None)


def await_staging(job: SaveJob, snapshot: Snapshot) -> None:
    """Until the copy is whole; raises what it failed with. A stager of another origin may have
    promised one that never comes."""
    limit = _limit(job)
    if not wait([snapshot.completion], limit).done:
        raise StagingError(
            f"the stager's copy was not there within {limit} s",
            kind="timeout",
            checkpoint=job.checkpoint_id,
            hint="raise timeout= or phase_timeouts={'staging': ...} if copying takes that long",
        )
    snapshot.completion.result()


def deadline_of_staging(job: SaveJob) -> Check:
    """From now on: for the wait for memory, and the copy."""
    limit = _limit(job)
    if limit is None:
        return no_check
    deadline = time.monotonic() + limit

    def check() -> None:
        if time.monotonic() >= deadline:
            raise CoordinationError(
                f"the state was not staged within {limit} s: an earlier save holds the memory, or "
                "the copy takes longer",
                kind="timeout",
                checkpoint=job.checkpoint_id,
                hint="wait for earlier saves, or allow more of them with max_pending=",
            )

    return check
