"""Every error the engine raises on purpose, grouped by what a handler would do about it.

Belongs here: exception classes, their stable ``kind`` strings, and how they print. Does not
belong here: deciding when to raise one, or turning an error into bytes for another rank.

``kind`` is the stable part: branch on it, not on the text. Its values are listed in ``KINDS``.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from dcp_engine.redaction import redact_url

__all__ = [
    "KINDS",
    "CheckpointError",
    "CheckpointException",
    "ConflictError",
    "CoordinationError",
    "DamagedCheckpointError",
    "InvalidPlanError",
    "NotFoundError",
    "StagingError",
    "StateMismatchError",
    "StorageError",
    "UnsafeContentError",
    "UnsupportedStateError",
    "UnsupportedVersionError",
    "UsageError",
    "WrappedException",
]

WrappedException = tuple[BaseException, traceback.StackSummary]
"""An exception of one rank and where it was raised, as torch's ``CheckpointException`` holds it."""

KINDS: Mapping[str, str] = {
    # NotFoundError
    "not_found": "there is no checkpoint at that place",
    "not_committed": "data is there, but the checkpoint was never committed",
    "incomplete": "a collective-free checkpoint lacks the manifests of some ranks",
    # DamagedCheckpointError
    "manifest_truncated": "the manifest ends early",
    "manifest_invalid": "the manifest is not what format version 1 describes",
    "unsafe_path": "the manifest names a file outside its data directory",
    "chunk_out_of_bounds": "a chunk lies outside its tensor or its file",
    "chunks_overlap": "two chunks claim the same elements or the same bytes",
    "file_missing": "a file that the manifest names is not there",
    "file_short": "a file is shorter or longer than the manifest says",
    "header_mismatch": "a data file's header disagrees with the manifest",
    "digest_mismatch": "bytes differ from what was written",
    "object_invalid": "the encoding of an object is damaged",
    # UnsupportedVersionError
    "unsupported_version": "the checkpoint was written by a newer format",
    # StateMismatchError
    "missing_key": "the checkpoint does not hold a key that was asked for",
    "shape_mismatch": "the destination has another shape",
    "dtype_mismatch": "the destination has another dtype",
    "type_mismatch": "tensor against object, or another tensor subclass",
    "world_size_mismatch": "per-rank values at another world size",
    # UnsupportedStateError
    "unsupported_state": "the value could not be loaded again, so it is refused at save",
    "duplicate_key": "two values have one fully qualified name",
    # InvalidPlanError
    "plan_gap": "chunks do not cover a tensor",
    "plan_overlap": "chunks overlap, or lie outside the tensor",
    "plan_divergence": "ranks disagree about a tensor's shape, dtype or kind",
    "replicas_differ": "ranks hold different values under one replicated key",
    "results_mismatch": "what was written is not what was planned",
    # StorageError
    "disk_full": "no space or quota left",
    "permission_denied": "the medium refuses access",
    "io_error": "the medium failed",
    "unsupported_storage": "the backend lacks what was asked of it",
    # ConflictError
    "conflict": "another save committed to the same place meanwhile",
    "commit_in_doubt": "the save may or may not be committed; the manifest tells",
    "superseded": "the checkpoint was replaced while it was read",
    # StagingError
    "out_of_memory": "there is too little host memory to stage the state",
    "staging_torn": "values changed while they were being copied to staging memory",
    # CoordinationError
    "timeout": "a deadline passed",
    "stalled": "a rank stopped sending heartbeats",
    "store_lost": "the store, or its host, does not answer",
    "out_of_step": "ranks are in different operations",
    "interrupted": "stopped because another rank failed",
    "earlier_save_failed": "a rank raised what an earlier save had failed with, and took no part",
    "rank_failed": "a rank failed with an error that is not the engine's",
    "worker_start": "a worker process did not come up",
    "worker_died": "a worker process ended while it was needed",
    # UnsafeContentError
    "pickle_refused": "loading would execute a pickle",
    "import_refused": "loading would import a module",
    # UsageError
    "usage": "arguments contradict each other or the engine's state",
}


class CheckpointError(Exception):
    """Base of all errors of the engine.

    Args:
        message: what was being done and what went wrong, one sentence.
        kind: one of ``KINDS``; each subclass has a default.
        checkpoint: the checkpoint's id (path or URL); kept without credentials.
        file: the file inside the checkpoint.
        tensor: the fully qualified name of the tensor or object.
        rank: the rank that met the error, in the process group of the operation.
        hint: what to do next; where it is not given, the class's ``default_hint``.

    The text of the exception holds all of these; they are also attributes.
    """

    default_kind = "io_error"
    default_hint: str | None = None

    def __init__(
        self,
        message: str,
        *,
        kind: str | None = None,
        checkpoint: object | None = None,
        file: str | None = None,
        tensor: str | None = None,
        rank: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.kind = kind if kind is not None else self.default_kind
        if self.kind not in KINDS:
            raise ValueError(f"unknown error kind {self.kind!r}; see dcp_engine.errors.KINDS")
        self.checkpoint = None if checkpoint is None else redact_url(str(checkpoint))
        self.file = file
        self.tensor = tensor
        self.rank = rank
        self.hint = hint if hint is not None else self.default_hint
        super().__init__(message)

    def with_context(
        self,
        *,
        checkpoint: object | None = None,
        file: str | None = None,
        tensor: str | None = None,
        rank: int | None = None,
    ) -> CheckpointError:
        """Fill in what the place that raised did not know; what is set already stays."""
        if self.checkpoint is None and checkpoint is not None:
            self.checkpoint = redact_url(str(checkpoint))
        self.file = self.file if self.file is not None else file
        self.tensor = self.tensor if self.tensor is not None else tensor
        self.rank = self.rank if self.rank is not None else rank
        return self

    def __str__(self) -> str:
        where = [
            f"{name} {value!r}" if isinstance(value, str) else f"{name} {value}"
            for name, value in (
                ("checkpoint", self.checkpoint),
                ("file", self.file),
                ("tensor", self.tensor),
                ("rank", self.rank),
            )
            if value is not None
        ]
        text = f"[{self.kind}] {self.message}"
        if where:
            text += f" ({', '.join(where)})"
        if self.hint:
            text += f". {self.hint[0].upper()}{self.hint[1:]}"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k != "message"}
        if isinstance(self, OSError):
            state["errno"] = self.errno  # OSError keeps it outside of __dict__
        return _rebuild, (type(self), self.message, state)


def _rebuild(cls: type[CheckpointError], message: str, state: dict[str, Any]) -> CheckpointError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.message = message
    for name, value in state.items():
        setattr(error, name, value)
    return error


class NotFoundError(CheckpointError, KeyError):
    """There is no committed checkpoint to read."""

    default_kind = "not_found"
    default_hint = "check the path"
    __str__ = CheckpointError.__str__


class DamagedCheckpointError(CheckpointError):
    """What is stored is not what was written. Take another checkpoint."""

    default_kind = "manifest_invalid"
    default_hint = "take another checkpoint"


class UnsupportedVersionError(CheckpointError):
    """The checkpoint needs another version of dcp_engine."""

    default_kind = "unsupported_version"
    default_hint = "install a newer dcp_engine"


class StateMismatchError(CheckpointError, ValueError):
    """The destination does not fit the checkpoint. Change the state dict or the options."""

    default_kind = "shape_mismatch"
    default_hint = "make the destination what was saved, or leave the key out"


class UnsupportedStateError(CheckpointError, TypeError):
    """The state dict holds something that could not be loaded again. Nothing was written."""

    default_kind = "unsupported_state"
    default_hint = "make it plain tensors and objects, or leave it out"


class InvalidPlanError(CheckpointError, ValueError):
    """The ranks' plans do not fit together. Nothing was committed."""

    default_kind = "plan_divergence"


class StorageError(CheckpointError, OSError):
    """The medium failed or refused. Free space, mend permissions, try again."""

    default_kind = "io_error"
    default_hint = "look for what is wrong with the medium, and try again"
    __str__ = CheckpointError.__str__


class ConflictError(CheckpointError):
    """Somebody else wrote to the same checkpoint, or the outcome of the commit is unknown."""

    default_kind = "conflict"
    default_hint = "save again"


class StagingError(CheckpointError):
    """The state could not be copied aside. Nothing was written; a synchronous save may work."""

    default_kind = "out_of_memory"
    default_hint = "save synchronously, or stage a smaller state"


class CoordinationError(CheckpointError):
    """Ranks did not come together. The job, not the checkpoint, needs attention."""

    default_kind = "timeout"


class UnsafeContentError(CheckpointError):
    """The content would run code when loaded."""

    default_kind = "pickle_refused"


class UsageError(CheckpointError, ValueError):
    """The call itself is wrong."""

    default_kind = "usage"


class CheckpointException(CheckpointError):
    """A save or load failed on one rank or several; raised on every rank.

    Unlike torch's class of this name it is an ``Exception``. ``failures`` maps each rank that
    failed to its exception and traceback, the first cause first; ``kind`` is the first cause's.
    """

    default_kind = "rank_failed"

    def __init__(
        self,
        msg: str,
        failures: Mapping[int, WrappedException] | None = None,
        *,
        kind: str | None = None,
        checkpoint: object | None = None,
        hint: str | None = None,
    ) -> None:
        failures = dict(failures or {})
        first = next(iter(failures.values()))[0] if failures else None
        if kind is None and isinstance(first, CheckpointError):
            kind = first.kind
        super().__init__(msg, kind=kind, checkpoint=checkpoint, hint=hint)
        if isinstance(first, CheckpointError):
            self.with_context(
                checkpoint=first.checkpoint, file=first.file, tensor=first.tensor, rank=first.rank
            )
        self._failures = failures

    @property
    def failures(self) -> dict[int, WrappedException]:
        """Each failed rank's exception and where it was raised, the first cause first."""
        return self._failures

    def __str__(self) -> str:
        lines = [super().__str__()]
        for rank, (exception, stack) in self._failures.items():
            lines.append(f"rank {rank} failed with {type(exception).__name__}: {exception}")
            lines.extend(f"  {note}" for note in getattr(exception, "__notes__", ()))
            lines.extend("  " + line.rstrip() for line in traceback.format_list(stack))
        return "\n".join(lines)
