"""A rank whose save cannot begin tells the others.

Belongs here: taking part in the operation only to fail in it. Does not belong here: what failed
(``saver``, ``in_process``).
"""

from __future__ import annotations

from typing import Literal, NoReturn

from dcp_engine.async_saver.job import SaveJob
from dcp_engine.coordination.failures import raised_by_exit
from dcp_engine.coordination.interface import Decision
from dcp_engine.errors import CheckpointException, CoordinationError
from dcp_engine.saver.save import begin_save

__all__ = ["report_failure"]


def report_failure(
    job: SaveJob, error: BaseException, phase: Literal["staging", "agree"]
) -> NoReturn:
    """This rank failed before its save could begin: let the other ranks know, and raise what all
    of them raise; or ``error`` itself, if that is to end or interrupt this process."""

    def fail() -> bytes:
        raise error

    def decide(messages: list[bytes]) -> Decision:
        return Decision()

    try:
        with begin_save(
            job.session,
            checkpoint_id=job.checkpoint_id,
            writer=job.writer,
            options=job.options,
            number=job.number,
        ) as operation:
            operation.step(phase, fail, decide, regardless=True)
    except CheckpointException:
        # Another rank may have failed first, and the operation been over.
        if raised_by_exit(error):
            raise error from None
        raise
    raise CoordinationError("a failed step went well", kind="out_of_step") from error
