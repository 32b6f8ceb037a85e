"""The newest checkpoint below a directory that is whole.

Belongs here: which places hold checkpoints, their order, and why one is passed over. Does not
belong here: what whole means (``verify``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from dcp_engine.errors import CheckpointError, NotFoundError
from dcp_engine.format.names import (
    MANIFEST_NAME,
    TORCH_METADATA_NAME,
    parse_data_directory,
    parse_rank_manifest_name,
)
from dcp_engine.registry import is_chained, scheme_of

__all__ = ["Candidate", "Latest", "PassedOver", "choose_latest", "join_place", "places_of"]

_SHOWN = 5
_ASCII = re.compile(r"[\x00-\x7f]+")


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


def places_of(names: Iterable[str], unreadable: Iterable[str] = ()) -> list[str]:
    """The directories (relative, in order) in which, going by the names of files, a checkpoint
    lies or was begun, or torch's DCP saved one, which is none to load; the root itself, ``""``, is
    none. A directory that is ``unreadable`` may hold one: it is a place itself, unless it belongs
    to one."""
    places = {place for name in names if (place := _place_of(name))}
    places |= {name.rstrip("/") for name in unreadable if _place_of(name) is None}
    return sorted(places)


def _place_of(name: str) -> str | None:
    """Where the checkpoint lies that ``name`` belongs to; None if it belongs to none."""
    parts = name.rstrip("/").split("/")
    for depth, part in enumerate(parts):
        if _marks_checkpoint(part):
            return "/".join(parts[:depth])
    if parts[-1] == TORCH_METADATA_NAME and not name.endswith("/"):
        return "/".join(parts[:-1])
    return None


def _marks_checkpoint(name: str) -> bool:
    return (
        name == MANIFEST_NAME
        or parse_rank_manifest_name(name) is not None
        or parse_data_directory(name) is not None
    )


def join_place(root: str | os.PathLike[str], place: str) -> str:
    """The path or URL of ``place`` below ``root``; a URL's query stays at its end."""
    text = os.fspath(root)
    if text.startswith("file:") and scheme_of(root) == "file" and not is_chained(root):
        base = re.split(r"[?#]", text, maxsplit=1)[0]
        # Its path is unquoted when it is opened, and ends at "?" and "#"; "::" is a chain. What
        # is not ASCII, such as bytes that are no UTF-8, comes through as it is.
        quoted = _ASCII.sub(lambda part: quote(part[0]), place)
        return f"{base.rstrip('/')}/{quoted}{text[len(base) :]}"
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
