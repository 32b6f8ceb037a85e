"""Checkpointers: the objects that a trainer keeps and asks to save and to load.

Belongs here: the interface and the two implementations, over a writer or a checkpoint process.
Does not belong here: making the parts (``builder``).
"""

from __future__ import annotations

import abc
import logging
from concurrent.futures import Future
from typing import Any

from dcp_engine.checkpointer.checkpoint_process import CheckpointProcess
from dcp_engine.checkpointer.checkpoint_reader import CheckpointReader, LoadMismatchError
from dcp_engine.checkpointer.checkpoint_writer import CheckpointWriter
from dcp_engine.checkpointer.staging import CheckpointStager
from dcp_engine.checkpointer.types import STATE_DICT
from dcp_engine.checkpointer.utils import WriteFuture, wrap_future
from dcp_engine.closing import Closing
from dcp_engine.errors import CheckpointException, CoordinationError, UsageError

__all__ = ["AsyncCheckpointer", "Checkpointer", "SyncCheckpointer"]

logger = logging.getLogger(__name__)


class Checkpointer(Closing):
    """Saves and loads checkpoints; owns what that takes. A context manager."""

    @abc.abstractmethod
    def save(
        self, path: str, state_dict: STATE_DICT, **kwargs: Any
    ) -> tuple[Future[None], Future[None]] | None:
        """Save ``state_dict``; every rank calls this.

        Args:
            path: path or URL of the checkpoint, the same on all ranks.
            state_dict: ``DTensor`` and ``ShardedTensor`` are stored as sharded, every other leaf
                as this rank's own.
            kwargs: for the writer, which hands them to its commit hook.

        Returns:
            None when the checkpoint is committed, or ``(stage_future, write_future)``.
        """

    @abc.abstractmethod
    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load a checkpoint, on this rank alone.

        Args:
            path: path or URL of the checkpoint.
            state_dict: what to load; its tensors are filled in place. None for everything.
            default_map_location: where new tensors go, as in ``torch.load``.
            strict: refuse if the checkpoint lacks a key of ``state_dict``.
            kwargs: for the reader.

        Returns:
            ``state_dict``, or a new one.

        Raises:
            LoadMismatchError: (a ``RuntimeError``) keys are missing and ``strict``, or a
                destination does not fit.
            CheckpointNotFoundError: (a ``FileNotFoundError``) there is no checkpoint.
        """


class _ReadingCheckpointer(Checkpointer):
    """What both kinds share: a reader of their own."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """See ``Checkpointer.load``. The caller waits; a write under way goes on."""
        loaded, missing = self._reader.read(
            path, state_dict, map_location=default_map_location, **kwargs
        )
        if strict and missing:
            raise LoadMismatchError(
                f"the checkpoint lacks {len(missing)} keys: {', '.join(missing[:10])}"
                f"{', ...' if len(missing) > 10 else ''}",
                kind="missing_key",
                checkpoint=path,
                hint="leave them out, or load with strict=False",
            )
        return loaded


class SyncCheckpointer(_ReadingCheckpointer):
    """Saves while the caller waits.

    Args:
        writer, reader: the parts; the writer is closed with this.
    """

    def __init__(self, writer: CheckpointWriter, reader: CheckpointReader) -> None:
        super().__init__(reader)
        self._writer = writer

    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> None:
        """Save and commit; see ``CheckpointWriter.write``."""
        self._writer.write(path, state_dict, **kwargs)

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()


class AsyncCheckpointer(_ReadingCheckpointer):
    """Copies while the caller waits, or in the background, and has a process write the copy.

    Args:
        checkpoint_stager, checkpoint_process: make the copy and write it; closed with this.
        reader: loads.

    ``save`` and ``close`` are for one thread.
    """

    def __init__(
        self,
        checkpoint_stager: CheckpointStager,
        checkpoint_process: CheckpointProcess,
        reader: CheckpointReader,
    ) -> None:
        super().__init__(reader)
        self._stager = checkpoint_stager
        self._process = checkpoint_process
        self._write_future: Future[None] | None = None
        self._closed = False

    def save(
        self, path: str, state_dict: STATE_DICT, **kwargs: Any
    ) -> tuple[Future[None], Future[None]]:
        """Wait until the write before this one is over, copy, and hand over.

        Returns:
            ``(stage_future, write_future)``: the state may be changed when the first is done; the
            checkpoint is committed when the second is. Either fails with what it failed with.

        Raises:
            BaseException: what the write before this one failed with, once; nothing of this save
                is done then.
            UnsupportedStateError, StagingError: the state cannot be copied, or not be sent to
                another process. The other ranks' writes fail by the same.
        """
        if self._closed:
            raise UsageError("the checkpointer is closed", checkpoint=path, hint="make a new one")
        # The others may be about to begin this write: it counts on all ranks, whatever happens.
        try:
            self._raise_previous_failure()
        except BaseException as error:
            reason = CoordinationError(
                f"the write was given up, because the one before it had failed: {error}",
                kind="interrupted",
            )
            self._process.write(_failed(reason), path)
            raise
        try:
            staged = self._stager.stage(state_dict, **kwargs)
        except BaseException as error:
            self._process.write(_failed(error), path)
            raise
        self._write_future = self._process.write(staged, path, **kwargs)
        return wrap_future(staged), self._write_future

    def _raise_previous_failure(self) -> None:
        previous, self._write_future = self._write_future, None
        failure = None if previous is None else previous.exception()
        if failure is None:
            return
        if isinstance(failure, CheckpointException) and failure.kind == "interrupted":
            # Another rank gave the write up, because it was told of a failure before it. To give
            # up here in turn would have the ranks fail each other for ever.
            logger.warning("the write before this one was given up: %s", failure)
            return
        raise failure

    def close(self) -> None:
        """Wait for the write under way, and end the process.

        Raises what that write failed with, if nobody has asked for it yet.
        """
        if self._closed:
            return
        self._closed = True
        previous, self._write_future = self._write_future, None
        try:
            self._process.close()
        finally:
            self._stager.close()
        if isinstance(previous, WriteFuture):
            failure = previous.unseen_failure()
            if failure is not None:
                raise failure


def _failed(error: BaseException) -> Future[STATE_DICT]:
    failed: Future[STATE_DICT] = Future()
    failed.set_exception(error)
    return failed
