"""The newest checkpoint below a directory that is whole.

Belongs here: which places hold checkpoints, their order, and why one is passed over. Does not
belong here: what whole means (``verify``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dcp_engine.errors import CheckpointError, NotFoundError
from dcp_engine.format.names import (
    MANIFEST_NAME,
    parse_data_directory,
    parse_rank_manifest_name,
)

__all__ = ["Candidate", "Latest", "PassedOver", "choose_latest", "join_place", "places_of"]

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """A checkpoint that is not the answer, and why."""

    checkpoint: str
    kind: str
    """Of the error; see ``dcp_engine.errors.KINDS``."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Latest:
    """The newest checkpoint that is whole."""

    checkpoint: str
    """Its path or URL, for ``load``."""
    save_id: str
    committed_at: float
    """Seconds since 1970, by the clock of the host that committed."""
    passed_over: tuple[PassedOver, ...] = ()
    """Newer ones, and ones whose time cannot be told, in the order in which they were looked
    at."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A place whose manifest could be read."""

    checkpoint: str
    save_id: str
    committed_at: float


def places_of(names: Iterable[str]) -> list[str]:
    """The directories (relative, in order) in which, going by the names of files, a checkpoint
    lies or was begun; the root itself, ``""``, is none."""
    places = set()
    for name in names:
        parts = name.rstrip("/").split("/")
        for depth, part in enumerate(parts):
            if depth and _marks_checkpoint(part):
                places.add("/".join(parts[:depth]))
                break
    return sorted(places)


def _marks_checkpoint(name: str) -> bool:
    return (
        name == MANIFEST_NAME
        or parse_rank_manifest_name(name) is not None
        or parse_data_directory(name) is not None
    )


def join_place(root: str | os.PathLike[str], place: str) -> str:
    """The path or URL of ``place`` below ``root``; a URL's query stays at its end."""
    text = os.fspath(root)
    base, mark, query = text.partition("?") if "://" in text else (text, "", "")
    return f"{base.rstrip('/')}/{place}{mark}{query}"


def choose_latest(
    checkpoints: Sequence[str],
    look: Callable[[str], Candidate],
    verify: Callable[[str], object],
    *,
    root: str,
) -> Latest:
    """The newest of ``checkpoints`` that ``verify`` does not refuse; of two with one time the one
    whose path comes last.

    Args:
        look: reads a manifest; raises ``CheckpointError`` if there is none that can be read.
        verify: raises ``CheckpointError`` for a checkpoint that is not whole.
    Raises:
        NotFoundError: there is none; the message says why each was passed over.
    """
    passed_over: list[PassedOver] = []
    candidates: list[Candidate] = []
    for checkpoint in checkpoints:
        try:
            candidates.append(look(checkpoint))
        except CheckpointError as error:
            passed_over.append(_passed_over(checkpoint, error))
    candidates.sort(key=lambda c: (c.committed_at, c.checkpoint), reverse=True)
    for candidate in candidates:
        try:
            verify(candidate.checkpoint)
        except CheckpointError as error:
            passed_over.append(_passed_over(candidate.checkpoint, error))
            continue
        return Latest(
            checkpoint=candidate.checkpoint,
            save_id=candidate.save_id,
            committed_at=candidate.committed_at,
            passed_over=tuple(passed_over),
        )
    reasons = "; ".join(f"{p.checkpoint}: {p.reason}" for p in passed_over[:_SHOWN])
    more = f"; and {len(passed_over) - _SHOWN} more" if len(passed_over) > _SHOWN else ""
    raise NotFoundError(
        f"no checkpoint below {root} is whole"
        + (f" (passed over: {reasons}{more})" if passed_over else ": there is none"),
        checkpoint=root,
        hint="look at the checkpoints that were passed over, or start anew",
    )


def _passed_over(checkpoint: str, error: CheckpointError) -> PassedOver:
    return PassedOver(checkpoint=checkpoint, kind=error.kind, reason=error.message)
