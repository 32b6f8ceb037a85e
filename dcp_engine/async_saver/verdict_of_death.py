"""What became of a save whose worker died on this rank: told to the others, and found out."""

from __future__ import annotations

import logging
import time

from dcp_engine.async_saver.job import SaveJob
from dcp_engine.coordination.failures import capture, exception_of
from dcp_engine.errors import CheckpointError, CheckpointException
from dcp_engine.native_storage import ColumnarWriter, CommitRecord
from dcp_engine.saver.outcome import proved_uncommitted
from dcp_engine.saver.save import checkpoint_name

__all__ = ["after_death", "failure_of_worker", "settle_dead_worker"]

logger = logging.getLogger(__name__)

_COMMIT_PATIENCE = 10.0
"""Seconds to look for a manifest that another rank may be about to write."""
_LOOK = 0.1


def settle_dead_worker(
    job: SaveJob,
    error: CheckpointError,
    *,
    save_id: str,
    phase: str,
    told: CheckpointException | None,
) -> CommitRecord:
    """Tell the other ranks, and find out whether the save was committed all the same.

    Args:
        error: how the worker ended. It had not left the operation.
        save_id: as far as the worker told; empty if it had none.
        phase: the last one that the worker told of.
        told: what the save failed with before that, if the worker told: it died as it tidied up.
    Returns:
        The commit, if it is proved.
    Raises:
        CheckpointException: with kind ``commit_in_doubt`` if neither is proved.
    """
    coordinator = job.options.coordinator_rank if job.options.use_collectives else 0
    try:
        death = job.session.report_death(
            job.number,
            coordinator_rank=coordinator,
            error=error,
            checkpoint=checkpoint_name(job.checkpoint_id, job.writer) if told is None else None,
        )
    except CheckpointError:
        logger.warning("the other ranks could not be told of the worker's end", exc_info=True)
        raise _in_doubt(job, error) from error
    failure = after_death(told, error) if told is not None else death.failure
    if failure is None:
        failure = _failure_of(job, error)
    if not save_id or failure.kind == "commit_in_doubt":
        raise failure
    if proved_uncommitted(failure, coordinator):
        raise failure
    others_commit = death.outcome == "commit" and job.session.rank != coordinator
    deadline = time.monotonic() + (_COMMIT_PATIENCE if others_commit else 0.0)
    while True:
        looked, record = _find(job, save_id)
        if record is not None:
            return record
        if time.monotonic() >= deadline:
            break
        time.sleep(_LOOK)
    if others_commit or (death.outcome != "abort" and phase == "commit" and not looked):
        raise _in_doubt(job, error) from error
    raise failure


def after_death(failure: CheckpointException, error: CheckpointError) -> CheckpointException:
    """``failure``, with a note of how the worker ended that had told of it."""
    failure.add_note(f"and then the worker was lost: {error.message}")
    return failure


def _find(job: SaveJob, save_id: str) -> tuple[bool, CommitRecord | None]:
    """Whether the medium could be asked, and the commit, if it is there."""
    writer = job.writer
    if not isinstance(writer, ColumnarWriter):
        return False, None
    try:
        return True, writer.find_commit(job.checkpoint_id, save_id)
    except CheckpointError:
        logger.warning("the checkpoint could not be looked at", exc_info=True)
        return False, None


def failure_of_worker(job: SaveJob, error: BaseException) -> CheckpointException:
    """What this rank raises of what its worker raised: what a worker was interrupted or ended by
    is no interrupt of this process."""
    return error if isinstance(error, CheckpointException) else _failure_of(job, error)


def _failure_of(job: SaveJob, error: BaseException) -> CheckpointException:
    """What the caller gets for ``error`` of this rank's worker."""
    rank = job.group.rank
    return exception_of(
        [capture(rank, error)],
        doing="save by the worker process",
        checkpoint=checkpoint_name(job.checkpoint_id, job.writer),
        local=(rank, error),
    )


def _in_doubt(job: SaveJob, error: CheckpointError) -> CheckpointException:
    failure = _failure_of(job, error)
    return CheckpointException(
        f"whether save {job.number} was committed is not known: {error.message}",
        failure.failures,
        kind="commit_in_doubt",
        checkpoint=checkpoint_name(job.checkpoint_id, job.writer),
        hint="nothing was deleted; the next save, load or prune decides by the manifest",
    )
