"""What ``decide`` returned, checked before it is sent.

Belongs here: nothing but that check, which every session makes.
"""

from __future__ import annotations

from dcp_engine.coordination.interface import Decision
from dcp_engine.errors import UsageError

__all__ = ["checked_answers"]


def checked_answers(decision: Decision, world_size: int) -> list[bytes] | None:
    """The answers for each rank, or None if there are none.

    Raises:
        UsageError: ``decide`` returned another number of answers than there are ranks.
    """
    if decision.per_rank is None:
        return None
    answers = [bytes(answer) for answer in decision.per_rank]
    if len(answers) != world_size:
        raise UsageError(
            f"decide returned {len(answers)} answers for {world_size} ranks",
            hint="return one per rank, or None",
        )
    return answers
