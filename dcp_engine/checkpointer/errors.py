"""The engine's errors, as the builtins that callers of this layer catch."""

from __future__ import annotations

from typing import Self

from dcp_engine.errors import CheckpointError, NotFoundError, StateMismatchError

__all__ = ["CheckpointNotFoundError", "LoadMismatchError"]


class _Builtin(CheckpointError):
    """One that is a builtin as well."""

    __str__ = CheckpointError.__str__

    @classmethod
    def of(cls, error: CheckpointError) -> Self:
        """The same error, as this class."""
        return cls(
            error.message,
            kind=error.kind,
            checkpoint=error.checkpoint,
            file=error.file,
            tensor=error.tensor,
            rank=error.rank,
            hint=error.hint,
        )


class LoadMismatchError(_Builtin, StateMismatchError, RuntimeError):
    """What is asked for does not fit the checkpoint."""


class CheckpointNotFoundError(_Builtin, NotFoundError, FileNotFoundError):
    """There is no committed checkpoint to read."""
