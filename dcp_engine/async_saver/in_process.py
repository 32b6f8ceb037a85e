"""A save by this rank's worker process, as its parent sees it.

Belongs here: spawning and replacing the worker, what it is sent, and what becomes of a save whose
worker died. Does not belong here: the worker's side (``worker``), the process as such
(``executors.process``).

The worker carries out the parent's own operation, under the number that the parent took: to the
other ranks it is the rank. So there is one protocol between ranks, and a dead worker needs no
message but one: its parent says that the rank failed.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import xxhash

from dcp_engine.async_saver.job import SaveJob
from dcp_engine.async_saver.messages import (
    SAVE,
    TOUCH,
    ColumnPart,
    ColumnStructure,
    SaveAnswer,
    SaveRequest,
    StatePart,
    TouchRequest,
    decode,
    encode,
)
from dcp_engine.async_saver.news import News
from dcp_engine.async_saver.report_failure import report_failure
from dcp_engine.async_saver.response import Progress
from dcp_engine.async_saver.snapshot import ColumnSnapshot, StateSnapshot
from dcp_engine.async_saver.verdict_of_death import (
    after_death,
    failure_of_worker,
    settle_dead_worker,
)
from dcp_engine.coordination.interface import Deadlines, Session
from dcp_engine.errors import CheckpointError, CoordinationError
from dcp_engine.executors.process import (
    WorkerError,
    WorkerProcess,
    WorkerSettings,
    dumps,
)
from dcp_engine.format.metadata_view import ManifestMetadata
from dcp_engine.metadata import Metadata
from dcp_engine.native_storage import ColumnarWriter, CommitRecord
from dcp_engine.planning.fingerprint import fingerprint
from dcp_engine.saver.save import checkpoint_name
from dcp_engine.staging.arena import Arena
from dcp_engine.staging.arena_stager import Staging
from dcp_engine.staging.staged_pickle import dump_staged
from dcp_engine.storage import StorageWriter

__all__ = ["Parcel", "ProcessSaver"]

logger = logging.getLogger(__name__)

_HANDLER = "dcp_engine.async_saver.worker:make_handler"
_SLACK = 30.0
"""Seconds that a worker has beyond the save's own deadline to say that it passed. One that is
stopped has none."""
_TOUCH_STALL = 60.0
"""Seconds for which a worker may be stopped while it is to map memory."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """One save, ready to be sent."""

    request: SaveRequest
    staging: Staging
    snapshot: ColumnSnapshot | StateSnapshot


@dataclass(frozen=True, kw_only=True)
class _Employed:
    """A worker, and what it has."""

    worker: WorkerProcess
    arenas: set[int] = field(default_factory=set)
    """Names of those whose descriptors it was sent."""

    def missing(self, name: int, arena: Arena) -> list[int]:
        """The descriptor of ``arena``, unless it was sent."""
        return [] if name in self.arenas else [arena.fileno()]


class ProcessSaver:
    """Saves by a worker process, one save at a time. ``start`` and ``close`` may be called from
    any thread.

    Args:
        rank: of this process, for names.
        nice: as ``WorkerSettings`` has it.
    """

    def __init__(self, rank: int, *, nice: int) -> None:
        self._rank = rank
        self._nice = nice
        self._lock = threading.Lock()
        self._employed: _Employed | None = None
        self._generation = 0
        self._forget = False
        self._closed = False
        self._remains: list[tuple[Session, int]] = []
        """Operations in which a worker died, with what it may have left in the store."""
        self.bytes_sent = 0
        """Of the requests of the last save, for the benchmark."""

    @property
    def pid(self) -> int | None:
        """Of the present worker."""
        employed = self._employed
        return None if employed is None or not employed.worker.alive else employed.worker.pid

    def start(self) -> None:
        """Have a worker, or one on its way; returns at once."""
        self._present()

    def _present(self) -> _Employed:
        with self._lock:
            if self._closed:
                raise WorkerError("the engine is closed, and its worker with it")
            employed = self._employed
            if employed is None or not employed.worker.alive:
                if employed is not None:
                    employed.worker.close()
                name = f"dcp_engine-saver-{self._rank}"
                settings = WorkerSettings(
                    handler=_HANDLER, name=name, rank=self._rank, nice=self._nice
                )
                employed = self._employed = _Employed(worker=WorkerProcess(settings))
            employed.worker.start()
            return employed

    def forget_plans(self) -> None:
        """The next save plans anew."""
        self._forget = True

    def touch(self, arena: Arena, touched: int) -> None:
        """Have the worker map ``arena``, and ``touched`` bytes of it in its page tables."""
        name = _name_of(arena)
        request = TouchRequest(arena=name, arena_size=arena.size, touched=touched)
        employed = self._present()
        employed.worker.call(
            TOUCH,
            encode(request),
            descriptors=employed.missing(name, arena),
            stall_timeout=_TOUCH_STALL,
        )
        employed.arenas.add(name)

    def pack(self, job: SaveJob, snapshot: ColumnSnapshot | StateSnapshot) -> Parcel:
        """What ``save`` will send, on the calling thread; the copy may still be under way.

        Raises ``UsageError`` or ``UnsupportedStateError`` for what cannot be pickled, by name.
        """
        if isinstance(snapshot, ColumnSnapshot):
            staging = snapshot.staging
        else:
            staging = snapshot.staged.staging
        request = SaveRequest(
            number=job.number,
            session=pickle.dumps(job.session.handle()),
            checkpoint=checkpoint_name(job.checkpoint_id, job.writer),
            checkpoint_id=job.checkpoint_id,
            writer=dumps(job.writer),
            options=dumps(job.options),
            rank=job.group.rank,
            world_size=job.world_size,
            arena=_name_of(staging.arena),
            arena_size=staging.arena.size,
            part=_part(snapshot),
            generation=0,
            forget_plans=False,
        )
        return Parcel(request=request, staging=staging, snapshot=snapshot)

    def save(self, job: SaveJob, parcel: Parcel, tell: Callable[[Progress], None]) -> Metadata:
        """Save what was packed, when its staging is complete.

        Raises what all ranks raise; of a worker that died, ``CheckpointException`` with the cause
        ``CoordinationError(kind="worker_died")``, or ``stalled``; what the save had failed with
        before, if it had.
        """
        request, arena = parcel.request, parcel.staging.arena
        request.generation = self._generation
        request.forget_plans, self._forget = self._forget, False
        news = News(tell, parcel.staging.bytes_total)
        deadlines = job.options.deadlines
        try:
            answer = self._ask_living(request, arena, news, deadlines)
            while answer.unknown_structure or answer.unknown_arena:
                if answer.unknown_structure:
                    request.part = _part(parcel.snapshot, whole=True)
                else:
                    self._present().arenas.discard(request.arena)
                answer = self._ask_living(request, arena, news, deadlines)
            if answer.as_told:
                answer = news.told_answer()
        except WorkerError as error:
            self._generation += 1  # the workers may have made a group of which nobody told
            self._give_up_worker()
            self._remains.append((job.session, job.number))
            answer = _after_death(job, error, news)
        except BaseException as error:
            self._generation += 1
            if news.phase == "join":
                self._give_up_worker()  # a thread of it may still wait for the group
            cause = error if news.phase else _failed_for_worker(job, error)
            failure = failure_of_worker(job, cause)
            if failure is error:
                raise
            raise failure from error
        self._generation = max(self._generation, answer.generation)
        self._remove_remains(job)
        if answer.record is not None:
            return _metadata(request.writer, job.checkpoint_id, answer.record)
        metadata: Metadata = pickle.loads(answer.metadata)
        return metadata

    def close(self, timeout: float | None = None) -> None:
        """End the worker; a save that is under way in it fails. Any number of times."""
        with self._lock:
            self._closed = True
            employed = self._employed
        if employed is not None:
            employed.worker.close(timeout)

    def _remove_remains(self, job: SaveJob) -> None:
        """This save went well: all ranks have begun it, and ended those before it."""
        over = [
            number
            for session, number in self._remains
            if session is job.session and number != job.number
        ]
        self._remains = [
            (session, number)
            for session, number in self._remains
            if session is not job.session or number == job.number
        ]
        for number in over:
            try:
                job.session.remove_remains(number)
            except CheckpointError:
                logger.debug("what save %d left in the store stays", number, exc_info=True)

    def _ask_living(
        self, request: SaveRequest, arena: Arena, news: News, deadlines: Deadlines
    ) -> SaveAnswer:
        """Ask; once more if the worker was dead already. One that says nothing has not begun: its
        first words come before its first message to other ranks."""
        try:
            return self._ask(request, arena, news, deadlines)
        except WorkerError as error:
            if news.phase or error.kind not in ("worker_died", "stalled"):
                raise
            logger.warning("the worker is replaced: %s", error.message)
        self._give_up_worker()
        return self._ask(request, arena, news, deadlines)

    def _ask(
        self, request: SaveRequest, arena: Arena, news: News, deadlines: Deadlines
    ) -> SaveAnswer:
        body = encode(request)
        self.bytes_sent = len(body)
        employed = self._present()
        answer = employed.worker.call(
            SAVE,
            body,
            descriptors=employed.missing(request.arena, arena),
            on_progress=news,
            timeout=deadlines.timeout,
            grace=_SLACK,
            stall_timeout=deadlines.stall_timeout,
        )
        employed.arenas.add(request.arena)
        return decode(answer, SaveAnswer)

    def _give_up_worker(self) -> None:
        """It is dead, or does not answer; the next one starts now, to be ready in time."""
        with self._lock:
            employed, self._employed = self._employed, None
            closed = self._closed
        if employed is not None:
            employed.worker.close(0)
        if not closed:
            try:
                self.start()
            except (CheckpointError, OSError):
                # Closed meanwhile, or nothing to be had now: the save at hand is to be settled.
                logger.warning("there is no new worker yet", exc_info=True)


def _name_of(arena: Arena) -> int:
    """One that no other memory has for as long as any process holds this one: its inode."""
    return os.fstat(arena.fileno()).st_ino


def _failed_for_worker(job: SaveJob, error: BaseException) -> BaseException:
    """What a save ends with whose worker failed by ``error`` before its first words: nobody has
    told the other ranks, so this process fails in the operation for the worker."""
    try:
        report_failure(job, error, "agree")
    except BaseException as verdict:
        return verdict


def _after_death(job: SaveJob, error: WorkerError, news: News) -> SaveAnswer:
    """How a save ended whose worker died, or does not answer and is killed."""
    failure = None if news.failure is None else failure_of_worker(job, news.failure)
    if news.answer is not None:
        logger.warning("the worker was lost when the save was committed: %s", error.message)
        return news.answer
    if failure is not None and news.ended:
        raise after_death(failure, error)
    record = settle_dead_worker(job, error, save_id=news.save_id, phase=news.phase, told=failure)
    return SaveAnswer(record=record)


def _part(
    snapshot: ColumnSnapshot | StateSnapshot, *, whole: bool = False
) -> ColumnPart | StatePart:
    if isinstance(snapshot, StateSnapshot):
        return StatePart(
            state_dict=dump_staged(snapshot.staged.state_dict, snapshot.staged.staging.arena),
            planner=dumps(snapshot.planner),
        )
    source, layout = snapshot.source, snapshot.staging.layout
    structure = None
    if whole:
        structure = pickle.dumps(
            ColumnStructure(
                plan=source.plan,
                names=source.names,
                shapes=source.shapes,
                replicated_objects=source.replicated_objects,
                layout=layout,
            )
        )
    return ColumnPart(
        structure_id=xxhash.xxh3_128_digest(fingerprint(source.plan, {}) + layout.fingerprint()),
        structure=structure,
        dedup_to_lowest_rank=snapshot.dedup_to_lowest_rank,
        strict_replicas=snapshot.strict_replicas,
        compares=snapshot.compares,
    )


def _metadata(writer: bytes, checkpoint_id: str | None, record: CommitRecord) -> Metadata:
    """Of a checkpoint that the worker has committed, read when it is looked at."""
    own: StorageWriter = pickle.loads(writer)
    if not isinstance(own, ColumnarWriter):
        raise CoordinationError("a record came of a writer without columns", kind="out_of_step")
    own.reset(checkpoint_id)
    return ManifestMetadata.lazily(own.manifest_source(record))
