"""A load as columns: default planner, engine's own reader.

Steps: ``metadata`` and ``manifest`` (all ranks come to one manifest, see ``agreed_manifest``),
``plan`` (every rank finds out what it needs; a destination that does not fit fails here, before a
byte has moved), ``share`` (who reads what several ranks need; only where they hand it on),
``read``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec
import torch

from dcp_engine.collector import collector_paused
from dcp_engine.coordination.interface import Decision, Operation, Session
from dcp_engine.default_planner import DefaultLoadPlanner
from dcp_engine.error_context import located
from dcp_engine.errors import DamagedCheckpointError, StateMismatchError
from dcp_engine.format.manifest import Manifest
from dcp_engine.format.names import MANIFEST_NAME
from dcp_engine.loader.agreed_manifest import agree_on_manifest
from dcp_engine.loader.agreeing import DigestsOf, agreeing_names
from dcp_engine.loader.destination import Destination, Path
from dcp_engine.loader.medium import RankPlace, place_of, worth_handing_on
from dcp_engine.loader.objects import ObjectRequest, WantedObject, choose_object
from dcp_engine.loader.options import LoadOptions
from dcp_engine.loader.report import LoadReport
from dcp_engine.loader.restore import closing, partly_filled, run_restore, with_memory
from dcp_engine.loader.share import agree_on_share
from dcp_engine.native_storage import ColumnarReader
from dcp_engine.planning.load_plan import LoadSource, make_load_columns, unexpected_keys
from dcp_engine.state.adapters import GroupRanks, describe_leaves
from dcp_engine.state.flatten import FlatState, flatten
from dcp_engine.state.values import TensorValue

__all__ = ["load_columns"]


@dataclass(frozen=True, kw_only=True)
class _RankPlan:
    """What this rank reads and where it goes."""

    manifest: Manifest
    source: LoadSource
    objects: tuple[WantedObject, ...]
    lists: tuple[tuple[Path, tuple[torch.Tensor, ...]], ...]
    """Per-rank tensors of another world size, to be put in place as lists."""
    materialized: tuple[tuple[Path, torch.Tensor], ...]
    """Memory for tensors of the destination that had none, to be put in place of them."""
    missing: tuple[str, ...]
    skipped: tuple[str, ...]
    unexpected: tuple[str, ...]


class _RankWord(msgspec.Struct, frozen=True, array_like=True):
    """What one rank says when it has planned."""

    stateful: bool
    place: RankPlace


class _Common(msgspec.Struct, frozen=True, array_like=True):
    """What follows for all of them."""

    stateful: bool
    """Some rank hands state to a ``Stateful``."""
    once: bool
    """What several ranks need is read once."""


def load_columns(
    session: Session,
    operation: Operation,
    destination: Destination,
    *,
    checkpoint_id: str | None,
    reader: ColumnarReader,
    planner: DefaultLoadPlanner,
    group: GroupRanks,
    options: LoadOptions,
) -> LoadReport:
    """Carry one attempt at a load through on this rank."""
    plans: list[_RankPlan] = []

    def here(action: Callable[[], bytes]) -> Callable[[], bytes]:
        def local() -> bytes:
            with located(checkpoint=reader.checkpoint, rank=operation.rank):
                return action()

        return local

    def plan() -> bytes:
        destination.resolve()
        manifest = agreed.open()
        try:
            plan = _plan(
                manifest,
                destination,
                checkpoint=reader.checkpoint,
                planner=planner,
                group=group,
                world_size=operation.world_size,
                options=options,
                digests_of=lambda file, start: reader.block_digests(manifest, file, start),
            )
        except DamagedCheckpointError as error:
            if manifest.token is None:  # else it is one of several, or what they make together
                error.with_context(file=MANIFEST_NAME)
            raise
        plans.append(plan)
        alone = operation.world_size == 1
        place = (
            RankPlace(host="", is_local=True)
            if alone  # nobody to hand anything on to
            else place_of(reader, manifest, session.identity.boot_id)
        )
        return msgspec.msgpack.encode(_RankWord(stateful=destination.has_stateful, place=place))

    def conclude(messages: list[bytes]) -> Decision:
        words = [msgspec.msgpack.decode(message, type=_RankWord) for message in messages]
        once = options.shared_reads == "once" or (
            options.shared_reads == "auto" and worth_handing_on([word.place for word in words])
        )
        stateful = any(word.stateful for word in words)
        return Decision(common=msgspec.msgpack.encode(_Common(stateful=stateful, once=once)))

    def read() -> bytes:
        plan = plans[0]
        manifest, source = plan.manifest, plan.source
        # Contexts of wrapper subclasses are compared here too: before any tensor moves.
        for wanted in plan.objects:
            value = wanted.read(
                lambda stored: reader.read_object(manifest, stored),
                checkpoint=reader.checkpoint,
                allow_pickle=options.allow_pickle or planner.allow_pickle,
            )
            if wanted.request.path is not None:
                loaded.append((wanted.request.path, value))
        if part is None:
            count = reader.read_columns(manifest, source.columns, source.tensors, operation.check)
        else:
            count = part.read(reader, manifest, source, operation, open_groups)
        return msgspec.msgpack.encode(count)

    loaded: list[tuple[Path, object]] = []
    with closing(reader):
        agreed = agree_on_manifest(operation, reader, checkpoint_id)
        concluded, _ = operation.step("plan", here(plan), conclude)
        common_plan = msgspec.msgpack.decode(concluded, type=_Common)
        part = None
        if common_plan.once and operation.world_size > 1:
            manifest, source = plans[0].manifest, plans[0].source
            part = agree_on_share(operation, session, manifest, source)
        # Connections end after the step: a rank that fails is heard of through the operation, and
        # the others do not take it for one that died.
        with partly_filled(), ExitStack() as open_groups:
            common, _ = operation.step("read", here(read), _total)
    plan_ = plans[0]

    def restore() -> bytes:
        for path, tensors in plan_.lists:
            destination.put(path, list(tensors))
        for path, value in (*plan_.materialized, *loaded):
            destination.put(path, value)
        destination.finish()
        return b""

    run_restore(operation, here(restore), together=common_plan.stateful)
    return LoadReport(
        save_id=agreed.record.save_id,
        missing=plan_.missing,
        skipped=plan_.skipped,
        unexpected=plan_.unexpected,
        bytes_read=msgspec.msgpack.decode(common, type=int),
    )


def _total(messages: list[bytes]) -> Decision:
    total = sum(msgspec.msgpack.decode(message, type=int) for message in messages)
    return Decision(common=msgspec.msgpack.encode(total))


@collector_paused()
def _plan(
    manifest: Manifest,
    destination: Destination,
    *,
    checkpoint: str,
    planner: DefaultLoadPlanner,
    group: GroupRanks,
    world_size: int,
    options: LoadOptions,
    digests_of: DigestsOf,
) -> _RankPlan:
    flat = flatten(destination.resolved, flatten_state_dict=planner.flatten_state_dict)
    tensors: list[TensorValue] = []
    requests: list[ObjectRequest] = []
    leaves = list(flat.leaves)
    materialized: list[tuple[Path, torch.Tensor]] = []
    for at, leaf in enumerate(leaves):
        if isinstance(leaf.value, torch.Tensor) and leaf.value.is_meta:
            leaves[at] = with_memory(leaf)
            materialized.append((leaf.path, leaves[at].value))
    described = describe_leaves(
        leaves,
        group=group,
        flatten_sharded_tensors=planner.flatten_sharded_tensors,
        for_load=True,
    )
    for leaf, values in described:
        for value in values:
            if isinstance(value, TensorValue):
                tensors.append(value)
            else:
                own = value.fqn == leaf.fqn
                requests.append(ObjectRequest(value=value, path=leaf.path if own else None))
    names = {value.fqn for value in tensors}
    names.update([request.value.fqn for request in requests])
    rank, world_size = options.as_rank or (group.rank, world_size)
    agreeing = (
        agreeing_names(manifest, names, digests_of)
        if world_size != manifest.world_size
        else frozenset()
    )
    source = make_load_columns(
        tensors,
        manifest,
        rank=rank,
        world_size=world_size,
        strict=not planner.allow_partial_load,
        per_rank=options.per_rank,
        agreeing=agreeing,
    )
    chosen = [
        choose_object(
            request,
            manifest,
            rank=rank,
            world_size=world_size,
            options=options,
            allow_partial=planner.allow_partial_load,
            checkpoint=checkpoint,
            agreeing=agreeing,
        )
        for request in requests
    ]
    unanswered = [
        request.value.fqn
        for request, wanted in zip(requests, chosen, strict=True)
        if wanted is None
    ]
    skipped = {
        name
        for name in unanswered
        if name in manifest.per_rank_objects and world_size != manifest.world_size
    }
    return _RankPlan(
        manifest=manifest,
        source=source,
        objects=tuple(wanted for wanted in chosen if wanted is not None),
        lists=tuple((_list_path(flat, name), values) for name, values in source.lists),
        materialized=tuple(materialized),
        missing=(
            *source.missing,
            *(name for name in unanswered if name not in skipped),
        ),
        skipped=(*source.skipped, *(name for name in unanswered if name in skipped)),
        unexpected=unexpected_keys(manifest, names),
    )


def _list_path(flat: FlatState, name: str) -> Path:
    """Where the list of every rank's tensors called ``name`` goes."""
    path = flat.mappings.get(name)
    if path is None:  # a part of a leaf
        raise StateMismatchError(
            "the parts of a tensor subclass cannot be loaded as lists of every rank's",
            kind="world_size_mismatch",
            tensor=name,
            hint='load with per_rank="skip" to keep what is there, or leave the key out and read '
            "its parts with dcp_engine.open",
        )
    return path
