"""Which manifest all ranks load by, and how each of them comes to it.

Steps: ``metadata`` (all ranks read the manifest, and the coordinator publishes which one it read)
and, only where some rank has read another one, or none, ``manifest`` (that rank looks for the
coordinator's on the medium; for those that do not come to see it, the coordinator looks once more
and hands it over). Does not belong here: reading and decoding (the reader does).

On a network file system a rank may see the previous manifest, or none, for a while: NFS clients
cache attributes and absent names for up to a minute.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import msgspec

from dcp_engine.coordination.interface import Decision, Operation
from dcp_engine.error_context import located
from dcp_engine.errors import CheckpointError, StorageError
from dcp_engine.format.manifest import Manifest
from dcp_engine.format.names import MANIFEST_NAME
from dcp_engine.native_storage import ColumnarReader, CommitRecord

__all__ = [
    "HAND_OVER_BYTES",
    "LONG_PATIENCE_S",
    "PATIENCE_S",
    "AgreedManifest",
    "agree_on_manifest",
    "answer_lacking",
    "look_for_manifest",
]

PATIENCE_S = 2.0
"""How long a rank looks for the announced manifest before it asks for it: longer than a directory
entry takes to arrive on a healthy network file system, too short to matter."""
LONG_PATIENCE_S = 65.0
"""The same where the manifest is too large to be handed over: NFS clients cache attributes for
60 s at most (acregmax, acdirmax)."""
HAND_OVER_BYTES = 64 << 20
"""The largest manifest that travels over the store, whose host also serves the training job."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5

_NOT_IN_SIGHT = frozenset(
    {"superseded", "not_found", "not_committed", "incomplete", "manifest_truncated"}
)
"""Kinds of what a rank meets that sees an older state of the medium than the coordinator."""


class _Announced(msgspec.Struct, frozen=True, array_like=True):
    """What the coordinator publishes."""

    record: CommitRecord
    by_all: bool
    """All ranks have read that one."""


class AgreedManifest:
    """The outcome on one rank: which manifest, and the way to open it here."""

    def __init__(self, record: CommitRecord, open_here: Callable[[], Manifest]) -> None:
        self.record = record
        self._open = open_here

    def open(self) -> Manifest:
        """The manifest of ``record``; to be called once, inside a step of the operation."""
        return self._open()


def agree_on_manifest(
    operation: Operation, reader: ColumnarReader, checkpoint_id: str | None
) -> AgreedManifest:
    """Run the steps on this rank.

    Raises ``CheckpointException`` on all ranks: kind ``superseded`` if the manifest was replaced
    between the steps, ``io_error`` if some rank cannot see it and it is too large to hand over.
    """
    opened: list[tuple[Manifest, CommitRecord]] = []
    failed: list[CheckpointError] = []

    def here() -> AbstractContextManager[None]:
        return located(checkpoint=reader.checkpoint, rank=operation.rank)

    def announce() -> bytes:
        with here():
            reader.reset(checkpoint_id)
            # While the coordinator reads, so do all others: nearly always they find the same.
            try:
                opened.append(reader.open_checkpoint(checkpoint_id))
            except CheckpointError as error:
                if operation.is_coordinator:
                    raise
                failed.append(error)  # counts only if the coordinator finds one
                return b""
            return msgspec.msgpack.encode(opened[0][1])

    def publish(messages: list[bytes]) -> Decision:
        found = messages[operation.coordinator_rank]
        record = msgspec.msgpack.decode(found, type=CommitRecord)
        by_all = all(message == found for message in messages)
        return Decision(common=msgspec.msgpack.encode(_Announced(record=record, by_all=by_all)))

    announced, _ = operation.step("metadata", announce, publish)
    word = msgspec.msgpack.decode(announced, type=_Announced)
    record = word.record
    if word.by_all:
        return AgreedManifest(record, lambda: opened[0][0])

    def look() -> bytes:
        if failed and not _is_out_of_sight(failed[0]):
            with here():
                raise failed[0]
        if opened and opened[0][1] == record:
            return b""
        opened.clear()
        with here():
            found = look_for_manifest(operation, reader, checkpoint_id, record)
        if isinstance(found, Manifest):
            opened.append((found, record))
            return b""
        return f"{found.kind}: {found.message}".encode()

    def hand_over(messages: list[bytes]) -> Decision:
        lacking = {rank: text.decode() for rank, text in enumerate(messages) if text}
        with here():
            return answer_lacking(reader, record, lacking, operation.world_size)

    common, own = operation.step("manifest", look, hand_over)

    def open_here() -> Manifest:
        if opened:
            return opened[0][0]
        return reader.adopt_manifest(checkpoint_id, own or common, record)

    return AgreedManifest(record, open_here)


def look_for_manifest(
    operation: Operation,
    reader: ColumnarReader,
    checkpoint_id: str | None,
    record: CommitRecord,
    *,
    now: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Manifest | CheckpointError:
    """The manifest of ``record``, or what was there instead when patience ran out."""
    patience = PATIENCE_S if record.manifest_size <= HAND_OVER_BYTES else LONG_PATIENCE_S
    give_up = now() + patience
    delay = _FIRST_PAUSE_S
    while True:
        operation.check()
        try:
            manifest, _ = reader.open_checkpoint(checkpoint_id, record)
        except CheckpointError as error:
            if not _is_out_of_sight(error):
                raise
            if now() >= give_up:
                return error
        else:
            return manifest
        pause(delay)
        delay = min(delay * 2, _LONGEST_PAUSE_S)


def _is_out_of_sight(error: CheckpointError) -> bool:
    if isinstance(error, StorageError):
        return error.errno == errno.ESTALE
    return error.kind in _NOT_IN_SIGHT


def answer_lacking(
    reader: ColumnarReader, record: CommitRecord, lacking: Mapping[int, str], world_size: int
) -> Decision:
    """On the coordinator: the manifest for those who do not see it.

    Args:
        lacking: by rank, what is there instead.

    Raises ``ConflictError(kind="superseded")`` if it is no longer there: they were right.
    """
    if not lacking:
        return Decision()
    if record.manifest_size > HAND_OVER_BYTES:
        rank, seen = next(iter(lacking.items()))
        raise StorageError(
            f"{_ranks(lacking)} see another manifest than the coordinator reads (rank {rank}: "
            f"{seen}), and {record.manifest_size} bytes are too many to hand over",
            file=MANIFEST_NAME,
            rank=rank,
            hint="check that all hosts mount the same storage; if they do, load again when "
            "their caches have expired, or mount with shorter ones (actimeo)",
        )
    data = reader.manifest_bytes(record)
    if len(data) * len(lacking) <= HAND_OVER_BYTES:
        return Decision(per_rank=[data if r in lacking else b"" for r in range(world_size)])
    # One copy in the store, although those who need none fetch it too.
    return Decision(common=data)


def _ranks(lacking: Mapping[int, str], limit: int = 16) -> str:
    shown = ", ".join(map(str, list(lacking)[:limit]))
    return f"ranks [{shown}{', ...' if len(lacking) > limit else ''}]"
