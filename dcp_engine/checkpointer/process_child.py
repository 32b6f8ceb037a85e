"""The child of a checkpoint process: holds the writer, and writes what its parent sends.

Belongs here: making the writer, mapping arenas, and turning a request into a call of the writer.
Does not belong here: the loop around it, and dying (``executors.process``).
"""

from __future__ import annotations

from typing import Any

from dcp_engine.checkpointer.checkpoint_writer import CheckpointWriter
from dcp_engine.checkpointer.process_protocol import (
    ChildSettings,
    RequestType,
    SentState,
    WorkerRequest,
    WorkerResponse,
)
from dcp_engine.checkpointer.staging import StagedStateDict
from dcp_engine.errors import UsageError
from dcp_engine.executors.process import Handler, WorkerContext, dumps, loads
from dcp_engine.executors.process import WorkerRequest as Call
from dcp_engine.staging.arena import Arena
from dcp_engine.staging.staged_pickle import load_staged

__all__ = ["factory"]


def factory(init: bytes, context: WorkerContext) -> Handler:
    """For ``WorkerSettings.handler``; what the caller's functions raise ends the start."""
    settings: ChildSettings = loads(init)
    settings.subprocess_init_fn(*settings.subprocess_init_args)
    arguments = {"rank_info": settings.rank_info, **settings.checkpoint_writer_init_args}
    return _Child(settings.checkpoint_writer_init_fn(**arguments))


class _Child(Handler):
    """Answers requests, one after the other.

    Args:
        writer: a ``CheckpointWriter``, or whatever else has ``write`` and ``close``.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._arenas: dict[int, Arena] = {}
        self._closed = False

    def handle(self, request: Call) -> bytes:
        """See the interface."""
        asked: WorkerRequest = loads(request.body)
        if asked.request_type is RequestType.WRITE_CHECKPOINT:
            self._write(asked.payload, request.descriptors)
        elif asked.request_type is RequestType.TERMINATE_PROCESS:
            self.close()
        elif asked.request_type is not RequestType.PING:
            raise UsageError(f"a checkpoint process was asked to {asked.request_type!r}")
        return dumps(WorkerResponse(request_type=asked.request_type, success=True))

    def close(self) -> None:
        """Close the writer, once."""
        if not self._closed:
            self._closed = True
            self._writer.close()

    def _write(self, payload: dict[str, Any], descriptors: list[int]) -> None:
        path, state, turn = payload["path"], payload["state"], payload["turn"]
        writer = self._writer
        ours = writer if isinstance(writer, CheckpointWriter) else None
        if ours is not None:
            ours.take_turn(turn)
        try:
            if isinstance(state, BaseException):
                raise state
            writer.write(path, self._unpack(state, descriptors), **payload["kwargs"])
        except BaseException as error:
            if ours is not None:
                ours.give_up_turn(path, error)
            raise

    def _unpack(self, state: SentState, descriptors: list[int]) -> StagedStateDict:
        for number in self._arenas.keys() - state.arenas:
            self._arenas.pop(number).close()
        if descriptors:
            # Known already, if what it came with failed: the parent counts answers.
            known = self._arenas.pop(state.arena, None)
            if known is not None:
                known.close()
            self._arenas[state.arena] = Arena.attach(descriptors[0], state.arena_size)
        arena = self._arenas[state.arena]
        arena.extend(state.arena_size)
        return StagedStateDict(load_staged(state.pickled, arena), shared=state.shared, lease=None)
