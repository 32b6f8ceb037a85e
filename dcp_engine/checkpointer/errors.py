"""The engine's errors, as the builtins that callers of this layer catch."""

from __future__ import annotations

from dcp_engine.errors import CheckpointError, NotFoundError, StateMismatchError

__all__ = ["CheckpointNotFoundError", "LoadMismatchError"]


class LoadMismatchError(StateMismatchError, RuntimeError):
    """What is asked for does not fit the checkpoint."""

    __str__ = CheckpointError.__str__

    @classmethod
    def of(cls, error: StateMismatchError) -> LoadMismatchError:
        """The same error."""
        return cls(
            error.message,
            kind=error.kind,
            checkpoint=error.checkpoint,
            file=error.file,
            tensor=error.tensor,
            rank=error.rank,
            hint=error.hint,
        )


class CheckpointNotFoundError(NotFoundError, FileNotFoundError):
    """There is no committed checkpoint to read."""

    __str__ = CheckpointError.__str__

    @classmethod
    def of(cls, error: NotFoundError) -> CheckpointNotFoundError:
        """The same error."""
        return cls(
            error.message,
            kind=error.kind,
            checkpoint=error.checkpoint,
            file=error.file,
            rank=error.rank,
            hint=error.hint,
        )
