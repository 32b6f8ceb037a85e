"""A state dict that training cannot change any more, on its way to a checkpoint.

Belongs here: what is copied when ``async_save`` is called, and what a save makes of the copy. Does
not belong here: copying (``staging``) and saving (``in_thread``, ``in_process``).

There are three: of columns (default planner, engine's own writer), which are made while the caller
waits, so that nothing but bytes is left to do; of a staged state dict, for DCP's life cycle; and
whatever a custom stager returned.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeGuard

import torch

from dcp_engine.async_saver.job import SaveJob
from dcp_engine.async_saver.object_blob import pack_objects
from dcp_engine.async_saver.response import Progress
from dcp_engine.default_planner import DefaultSavePlanner
from dcp_engine.errors import UsageError
from dcp_engine.format.object_codec import EncodedObject
from dcp_engine.planner import SavePlanner
from dcp_engine.planning.local import LocalSource
from dcp_engine.saver.compare import digest_source
from dcp_engine.saver.prepare import PreparedState, prepare
from dcp_engine.saver.save import ColumnContent, ItemContent, content_of, takes_columns
from dcp_engine.staging.arena_stager import Sources, Staging
from dcp_engine.staging.stagers import AsyncStager, DefaultStager, StagedState
from dcp_engine.state.flatten import resolve_stateful
from dcp_engine.storage import Check

__all__ = [
    "ColumnSnapshot",
    "CustomSnapshot",
    "DirectSnapshot",
    "Snapshot",
    "StateSnapshot",
    "take_snapshot",
    "uses_arenas",
]

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class Snapshot(abc.ABC):
    """The copy of one state dict, whole when ``completion`` is done."""

    completion: Future[None]
    """Fails with what the copying failed with."""

    @abc.abstractmethod
    def content(self) -> ColumnContent | ItemContent:
        """What a save in this process writes; after ``completion``."""

    @abc.abstractmethod
    def release(self) -> None:
        """The save is over: nobody reads the copy any more."""

    @abc.abstractmethod
    def progress(self) -> Progress:
        """Of the copying; afterwards of the wait for what comes next."""


def uses_arenas(stager: AsyncStager) -> TypeGuard[DefaultStager]:
    """Whether each copy stays whole until it is released. Other stagers know nothing of releases,
    and may overwrite what they made before."""
    return type(stager) is DefaultStager


def take_snapshot(
    job: SaveJob,
    state_dict: Mapping[str, Any],
    *,
    planner: SavePlanner | None,
    stager: AsyncStager,
    background: bool,
    for_worker: bool,
    check: Check,
) -> Snapshot:
    """Copy ``state_dict``, or begin to.

    Args:
        background: begin to, where the stager is the engine's kind; as
            ``StagingOptions.use_async_staging`` says.
        for_worker: another process is going to read the copy.
        check: called while waiting for staging memory; what it raises ends the wait.
    Raises:
        UnsupportedStateError: for what cannot be saved, naming the key.
        StagingError: too little memory; nothing was touched.
    """
    if not uses_arenas(stager):
        # A stager knows nothing of ``Stateful``, and asking one later would be asking too late.
        plain, _ = resolve_stateful(state_dict)
        return CustomSnapshot(job, stager, stager.stage(plain), planner)
    background = background or stager.config.use_async_staging
    chosen = planner if planner is not None else DefaultSavePlanner()
    if isinstance(chosen, DefaultSavePlanner) and takes_columns(job.writer, chosen):
        return _take_columns(job, state_dict, chosen, stager, background, for_worker, check)
    staged = stager.begin(
        state_dict,
        background=background,
        group=job.group,
        flatten_state_dict=getattr(chosen, "flatten_state_dict", True),
        flatten_sharded_tensors=getattr(chosen, "flatten_sharded_tensors", True),
        check=check,
    )
    return StateSnapshot(staged, chosen)


def _take_columns(
    job: SaveJob,
    state_dict: Mapping[str, Any],
    planner: DefaultSavePlanner,
    stager: DefaultStager,
    background: bool,
    for_worker: bool,
    check: Check,
) -> ColumnSnapshot:
    options = job.options
    prepared = prepare(
        state_dict,
        planner=planner,
        group=job.group,
        strict_replicas=False,
        own_share_only=not options.use_collectives,
        compare=False,
    )
    names = prepared.source.plan.objects.names
    blob = pack_objects(names, prepared.objects) if for_worker else _NOTHING
    staging = stager.arenas.begin(
        Sources(
            tensors=[*prepared.source.tensors, blob],
            names=[*prepared.source.names, "objects"],
            watched=prepared.outer,
        ),
        background=background,
        check=check,
    )
    return ColumnSnapshot(
        # The originals may be freed from now on.
        source=dataclasses.replace(prepared.source, tensors=()),
        objects=prepared.objects,
        staging=staging,
        dedup_to_lowest_rank=planner.dedup_save_to_lowest_rank,
        strict_replicas=options.use_collectives
        and (options.strict_replicas or planner.strict_replicas),
        compares=job.compares,
    )


class ColumnSnapshot(Snapshot):
    """A local plan and the copies that its rows stand for."""

    def __init__(
        self,
        *,
        source: LocalSource,
        objects: Mapping[str, EncodedObject],
        staging: Staging,
        dedup_to_lowest_rank: bool,
        strict_replicas: bool,
        compares: bool,
    ) -> None:
        self.source = source
        """Without tensors."""
        self.objects = objects
        self.staging = staging
        self.dedup_to_lowest_rank = dedup_to_lowest_rank
        self.strict_replicas = strict_replicas
        self.compares = compares
        self.completion = staging.completion

    def content(self) -> ColumnContent:
        """See the base class."""
        return staged_columns(
            dataclasses.replace(self.source, tensors=tuple(self.staging.tensors()[:-1])),
            self.objects,
            dedup_to_lowest_rank=self.dedup_to_lowest_rank,
            strict_replicas=self.strict_replicas,
            compares=self.compares,
        )

    def release(self) -> None:
        """See the base class."""
        self.staging.release()
        self.objects = {}

    def progress(self) -> Progress:
        """See the base class."""
        return _staging_progress(self.staging)


def staged_columns(
    source: LocalSource,
    objects: Mapping[str, EncodedObject],
    *,
    dedup_to_lowest_rank: bool,
    strict_replicas: bool,
    compares: bool,
) -> ColumnContent:
    """Columns whose tensors are staged, in any process; their values are digested when the save
    asks for them, off the caller's path."""

    def prepared() -> PreparedState:
        return PreparedState(
            source=source,
            objects=objects,
            compared=digest_source(source, objects, strict=strict_replicas) if compares else {},
        )

    return ColumnContent(
        prepare=prepared,
        dedup_to_lowest_rank=dedup_to_lowest_rank,
        strict_replicas=strict_replicas,
    )


class StateSnapshot(Snapshot):
    """A staged state dict, and the planner that will look at it."""

    def __init__(self, staged: StagedState, planner: SavePlanner) -> None:
        self.staged = staged
        self.planner = planner
        self.completion = staged.completion

    def content(self) -> ItemContent:
        """See the base class."""
        return ItemContent(state_dict=self.staged.state_dict, planner=self.planner)

    def release(self) -> None:
        """See the base class."""
        self.staged.release()
        # Its tensors are views, which would hold the memory of a stager that is closed.
        self.staged = dataclasses.replace(self.staged, state_dict={})

    def progress(self) -> Progress:
        """See the base class."""
        return _staging_progress(self.staged.staging)


class CustomSnapshot(Snapshot):
    """What a stager of another origin made."""

    def __init__(
        self,
        job: SaveJob,
        stager: AsyncStager,
        made: Future[Any] | Mapping[str, Any],
        planner: SavePlanner | None,
    ) -> None:
        self._job = job
        self._made = made
        self.planner = planner
        self.completion = Future()
        self.completion.set_running_or_notify_cancel()
        if stager.should_synchronize_after_execute:
            stager.synchronize_staging()
        if isinstance(made, Future):
            made.add_done_callback(self._complete)
        else:
            self.completion.set_result(None)

    def state_dict(self) -> Mapping[str, Any]:
        """The copy; after ``completion``."""
        made: Mapping[str, Any] = (
            self._made.result() if isinstance(self._made, Future) else self._made
        )
        return made

    def content(self) -> ColumnContent | ItemContent:
        """See the base class."""
        job = self._job
        return content_of(
            self.state_dict(),
            writer=job.writer,
            planner=self.planner,
            group=job.group,
            options=job.options,
        )

    def release(self) -> None:
        """The memory is the stager's."""
        self._made = {}

    def progress(self) -> Progress:
        """A custom stager does not tell."""
        return Progress(
            phase="waiting" if self.completion.done() else "staging", bytes_done=0, bytes_total=0
        )

    def _complete(self, made: Future[Any]) -> None:
        error = made.exception()
        if error is not None:
            self.completion.set_exception(error)
        else:
            self.completion.set_result(None)


class DirectSnapshot(Snapshot):
    """No copy: the caller waits until the state itself has been saved."""

    def __init__(self, content: Callable[[], ColumnContent | ItemContent]) -> None:
        self._content: Callable[[], ColumnContent | ItemContent] | None = content
        self.completion = Future()
        self.completion.set_running_or_notify_cancel()
        self.completion.set_result(None)

    def content(self) -> ColumnContent | ItemContent:
        """See the base class."""
        if self._content is None:
            raise UsageError("the save is over, and its state was let go")
        return self._content()

    def release(self) -> None:
        """Nothing was taken but the caller's own."""
        self._content = None

    def progress(self) -> Progress:
        """See the base class."""
        return Progress(phase="waiting", bytes_done=0, bytes_total=0)


def _staging_progress(staging: Staging) -> Progress:
    return Progress(
        phase="waiting" if staging.completion.done() else "staging",
        bytes_done=staging.bytes_done,
        bytes_total=staging.bytes_total,
    )
