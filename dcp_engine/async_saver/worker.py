"""The worker's side: carries out its parent's saves.

Belongs here: attaching to sessions and arenas, and turning a request into a save. Does not belong
here: the loop around it, and dying (``executors.process.worker``).
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass

import torch.distributed as dist

from dcp_engine.async_saver.messages import (
    SAVE,
    TOUCH,
    ColumnPart,
    ColumnStructure,
    SaveAnswer,
    SaveRequest,
    TouchRequest,
    decode,
    encode,
)
from dcp_engine.async_saver.news import NewsSender
from dcp_engine.async_saver.object_blob import unpack_objects
from dcp_engine.async_saver.snapshot import staged_columns
from dcp_engine.async_saver.watched import WatchedOperation
from dcp_engine.async_saver.worker_group import alone, join_group
from dcp_engine.coordination.interface import Operation, Session, SessionHandle
from dcp_engine.errors import CoordinationError, UsageError
from dcp_engine.executors.process import (
    Handler,
    WorkerContext,
    WorkerRequest,
    loads,
)
from dcp_engine.executors.process.group import WorkerGroup
from dcp_engine.planning.cache import PlanCache
from dcp_engine.planning.local import LocalSource
from dcp_engine.saver import PlanMemory, SaveOptions
from dcp_engine.saver.save import ColumnContent, ItemContent, carry_out
from dcp_engine.staging.arena import Arena
from dcp_engine.staging.staged_pickle import load_staged
from dcp_engine.storage import StorageWriter

__all__ = ["SaveHandler", "make_handler"]

_STRUCTURES = 4
_ONLY_GENERATION = 1
"""Of a group of one rank, which nobody has to agree with."""
_ARENAS = 8
"""Kept mapped. The memory of a stager that its owner has dropped stays until then."""


def make_handler(init: bytes, context: WorkerContext) -> SaveHandler:
    """For ``WorkerSettings.handler``."""
    return SaveHandler()


class SaveHandler(Handler):
    """Saves one request after the other."""

    def __init__(self) -> None:
        self._places: dict[bytes, _Place] = {}
        self._arenas: OrderedDict[int, Arena] = OrderedDict()
        self._structures: PlanCache[bytes, ColumnStructure] = PlanCache(_STRUCTURES)

    def handle(self, request: WorkerRequest) -> bytes:
        """Answer one request; what it raises goes to the parent."""
        if request.kind == TOUCH:
            self._touch(decode(request.body, TouchRequest), request)
            return b""
        if request.kind != SAVE:
            raise UsageError(f"a worker for saves was asked to {request.kind!r}")
        return encode(self._save(decode(request.body, SaveRequest), request))

    def close(self) -> None:
        """Leave the sessions."""
        for place in self._places.values():
            place.close()

    def _touch(self, touch: TouchRequest, request: WorkerRequest) -> None:
        arena = self._arena(touch.arena, touch.arena_size, request)
        if arena is not None:
            arena.touch(touch.touched)

    def _arena(self, name: int, size: int, request: WorkerRequest) -> Arena | None:
        """The arena of that name; None if its descriptor is needed."""
        if request.descriptors:
            old = self._arenas.pop(name, None)
            if old is not None:
                old.close()
            self._arenas[name] = Arena.attach(request.descriptors[0], size)
            if len(self._arenas) > _ARENAS:
                _, unused = self._arenas.popitem(last=False)
                unused.close()
        arena = self._arenas.get(name)
        if arena is not None:
            self._arenas.move_to_end(name)
            arena.extend(size)
        return arena

    def _save(self, save: SaveRequest, request: WorkerRequest) -> SaveAnswer:
        arena = self._arena(save.arena, save.arena_size, request)
        if arena is None:
            return SaveAnswer(unknown_arena=True)
        part = save.part
        if isinstance(part, ColumnPart):
            if part.structure is not None:
                self._structures.put(part.structure_id, pickle.loads(part.structure))
            if self._structures.get(part.structure_id) is None:
                return SaveAnswer(unknown_structure=True)
        options: SaveOptions = loads(save.options)
        place = self._place(save.session)
        if save.forget_plans:
            place.memory.clear()
        news = NewsSender(request)
        with place.session.begin(
            "save",
            save.checkpoint,
            deadlines=options.deadlines,
            coordinator_rank=options.coordinator_rank if options.use_collectives else 0,
            number=save.number,
        ) as operation:
            # How it ended is told before the operation is left, and with it the other ranks can
            # be gone: if this process dies then, its parent has nobody left to ask.
            try:
                answer = self._save_in(operation, save, arena, place, options, news)
            except BaseException as error:
                news.fail(error, ended=True)
                raise
            news.succeed(answer)
        return SaveAnswer(as_told=True)

    def _save_in(
        self,
        operation: Operation,
        save: SaveRequest,
        arena: Arena,
        place: _Place,
        options: SaveOptions,
        news: NewsSender,
    ) -> SaveAnswer:
        watched = WatchedOperation(operation, news.look, news.fail)
        generation, unpacked = self._unpack_in_group(watched, save, arena, place)
        news.writer = unpacked.writer
        saved = carry_out(
            watched,
            unpacked.content,
            checkpoint_id=save.checkpoint_id,
            writer=unpacked.writer,
            identity=place.session.identity,
            rank=save.rank,
            world_size=save.world_size,
            memory=place.memory,
            options=options,
            announce=news.announce,
            by_worker=True,
        )
        place.group_in_doubt = False
        return SaveAnswer(
            generation=generation,
            record=saved.record,
            metadata=b"" if saved.record is not None else pickle.dumps(saved.metadata),
        )

    def _unpack_in_group(
        self, operation: Operation, save: SaveRequest, arena: Arena, place: _Place
    ) -> tuple[int, _Unpacked]:
        """In a step of the operation, so that the other ranks are told if it fails; and be in the
        workers' group. Returns its generation too, 0 if no other rank is in it."""
        unpacked: list[_Unpacked] = []

        def unpack() -> None:
            unpacked.append(self._unpack(save, arena))

        def unpack_and_be_alone() -> None:
            unpack()
            if place.group is not None:
                place.group.ensure(_ONLY_GENERATION)

        if place.group is None or place.session.world_size == 1:
            alone(operation, unpack_and_be_alone)
            return 0, unpacked[0]
        generation = join_group(
            operation,
            joined=place.joined,
            seen=max(save.generation, place.group.generation),
            ensure=place.group.ensure,
            before=unpack,
        )
        # What is the user's own may talk in it, and fail between two words: until it has gone
        # well, other words than the right ones may be on their way.
        place.group_in_doubt = isinstance(unpacked[0].content, ItemContent)
        return generation, unpacked[0]

    def _unpack(self, save: SaveRequest, arena: Arena) -> _Unpacked:
        writer: StorageWriter = loads(save.writer)
        part = save.part
        if not isinstance(part, ColumnPart):
            return _Unpacked(
                writer=writer,
                content=ItemContent(
                    state_dict=load_staged(part.state_dict, arena), planner=loads(part.planner)
                ),
            )
        structure = self._structures.get(part.structure_id)
        if structure is None:
            raise CoordinationError("a structure was forgotten in use", kind="out_of_step")
        return _Unpacked(writer=writer, content=_columns(part, structure, arena))

    def _place(self, handle: bytes) -> _Place:
        place = self._places.get(handle)
        if place is None:
            place = self._places[handle] = _Place(pickle.loads(handle))
        return place


@dataclass(frozen=True, kw_only=True)
class _Unpacked:
    """What came pickled."""

    writer: StorageWriter
    content: ColumnContent | ItemContent


class _Place:
    """One session of the parent, and what is kept between its saves."""

    def __init__(self, handle: SessionHandle) -> None:
        self.session: Session = handle.attach()
        self.memory = PlanMemory()
        has_group = bool(handle.identity.group)
        """Where the parent has none, a planner does not expect one here."""
        self.group = WorkerGroup(handle) if has_group else None
        self.group_in_doubt = False
        """A save failed that may have used it; the next one makes a new one."""

    @property
    def joined(self) -> int:
        """The generation of the group that this worker is in, 0 for none."""
        if self.group is None or self.group_in_doubt or not dist.is_initialized():
            return 0
        return self.group.generation

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
        self.session.close()


def _columns(part: ColumnPart, structure: ColumnStructure, arena: Arena) -> ColumnContent:
    *tensors, blob = structure.layout.views(arena)
    return staged_columns(
        LocalSource(
            plan=structure.plan,
            names=structure.names,
            shapes=structure.shapes,
            tensors=tuple(tensors),
            replicated_objects=structure.replicated_objects,
        ),
        unpack_objects(structure.plan.objects.names, blob.numpy().tobytes()),
        dedup_to_lowest_rank=part.dedup_to_lowest_rank,
        strict_replicas=part.strict_replicas,
        compares=part.compares,
    )
