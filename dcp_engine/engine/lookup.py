"""Which checkpoint, and is it whole: questions that need no process group.

Belongs here: ``verify`` and ``latest`` over the installed backends, and the step by which all
ranks of a load come to one answer. Does not belong here: the answers (``loader.verify``,
``loader.latest``).
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from dcp_engine.coordination.interface import Deadlines, Decision, Session
from dcp_engine.errors import CheckpointError, StorageError, UsageError
from dcp_engine.loader.latest import Candidate, Latest, choose_latest, join_place, places_of
from dcp_engine.loader.random_access import Checkpoint
from dcp_engine.loader.verify import (
    VERIFY_LEVELS,
    VerifyLevel,
    VerifyReport,
    verify_checkpoint,
)
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.redaction import redact_url
from dcp_engine.registry import BackendRegistry

__all__ = ["agree_on_latest", "latest", "open_place", "verify"]


def verify(
    checkpoint: str | os.PathLike[str], *, level: VerifyLevel = "full", **options: Any
) -> VerifyReport:
    """Read a committed checkpoint and compare it with its digests, in bounded memory.

    Args:
        checkpoint: path or URL.
        level: ``"full"``: that the files hold what the manifest names and nothing else, and every
            byte that a load can read; ``"manifest"``: that the manifest is whole,
            and its chunks lie in files it names.
        options: for the storage backend's reader.
    Raises:
        DamagedCheckpointError: naming file and tensor.
        NotFoundError: there is no committed checkpoint.
    """
    with open_place(BackendRegistry(), checkpoint, options) as opened:
        return verify_checkpoint(opened, checkpoint, level)


def latest(
    root: str | os.PathLike[str], *, verify: VerifyLevel = "manifest", **options: Any
) -> Latest:
    """The newest checkpoint below ``root`` that is whole, by the commit time in its manifest; of
    two with one time, the one whose path comes last. Needs no process group.

    Args:
        root: path or URL of a directory; checkpoints may lie at any depth below it.
        verify: how closely each one is looked at until one is whole; see ``verify``.
        options: for the storage backend's reader.
    Returns:
        Its place, and what was passed over, why.
    Raises:
        NotFoundError: there is none; the message says why each was passed over.
    """
    return _latest(BackendRegistry(), root, verify, options)


def agree_on_latest(
    session: Session,
    registry: BackendRegistry,
    root: str | os.PathLike[str],
    *,
    verify: VerifyLevel,
    deadlines: Deadlines,
    coordinator_rank: int,
) -> Latest:
    """``latest`` on the coordinator, and its answer on every rank of ``session``."""

    def look() -> bytes:
        if session.rank != coordinator_rank:
            return b""
        return msgspec.msgpack.encode(_latest(registry, root, verify, {}))

    with session.begin(
        "load", redact_url(os.fspath(root)), deadlines=deadlines, coordinator_rank=coordinator_rank
    ) as operation:
        common, _ = operation.step(
            "latest", look, lambda messages: Decision(common=messages[coordinator_rank])
        )
    return msgspec.msgpack.decode(common, type=Latest)


def open_place(
    registry: BackendRegistry, checkpoint: str | os.PathLike[str], options: dict[str, Any]
) -> Checkpoint:
    """Open a committed checkpoint of the engine's format."""
    reader = registry.reader(checkpoint, **options)
    if not isinstance(reader, ColumnarReader):
        raise StorageError(
            f"{type(reader).__name__} does not read dcp_engine's format",
            kind="unsupported_storage",
            checkpoint=checkpoint,
            hint="load it with dcp_engine.load",
        )
    return Checkpoint(reader, checkpoint)


def _latest(
    registry: BackendRegistry,
    root: str | os.PathLike[str],
    level: VerifyLevel,
    options: dict[str, Any],
) -> Latest:
    if level not in VERIFY_LEVELS:
        raise UsageError(f"verify is {level!r}", hint="it is 'manifest' or 'full'")

    def look(checkpoint: str) -> Candidate:
        with open_place(registry, checkpoint, options) as opened:
            return Candidate(
                checkpoint=checkpoint,
                save_id=opened.save_id,
                committed_at=opened.manifest.time,
            )

    def check(checkpoint: str) -> None:
        with open_place(registry, checkpoint, options) as opened:
            verify_checkpoint(opened, checkpoint, level)

    checkpoints = [join_place(root, place) for place in _places(registry, root)]
    return choose_latest(checkpoints, look, check, root=redact_url(os.fspath(root)))


def _places(registry: BackendRegistry, root: str | os.PathLike[str]) -> list[str]:
    try:
        with registry.open_store(root) as store:
            files = [*store.list()]
            return places_of(
                (file.name for file in files), (file.name for file in files if file.unreadable)
            )
    except CheckpointError:
        raise
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(
            f"the checkpoints below {redact_url(os.fspath(root))} cannot be listed: {error}",
            checkpoint=root,
        ) from error
