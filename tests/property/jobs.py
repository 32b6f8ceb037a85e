"""Runs the saving and the loading job of a ``World`` on threads, through the real engine.

Belongs here: state dicts, the calls, and what must come back. Does not belong here: drawing
worlds (``worlds``), and what the tests claim about bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dcp_engine.coordination.interface import Deadlines, Session
from dcp_engine.coordination.simulated import results_of, run_simulated
from dcp_engine.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from dcp_engine.loader import LoadOptions, LoadReport, load
from dcp_engine.metadata import Metadata
from dcp_engine.saver import PlanMemory, SaveOptions, save
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.state.per_rank import PerRank
from dcp_engine.storage import ByteStore
from storage_backends.memory import MemoryStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from tests.property.bytes_of import flipped, place, raw_of
from tests.property.forms import Held
from tests.property.worlds import Entry, Own, World

__all__ = [
    "DEADLINES",
    "SharedMemoryStore",
    "group_of",
    "load_world",
    "save_job",
    "save_world",
    "saved_state",
]

DEADLINES = Deadlines(timeout=60.0, stall_timeout=30.0)
_STEPS: Any = [{"step": 3}, {"step": 4, "none": {}}]
_OLD = "as it was"


class SharedMemoryStore(MemoryStore):
    """Shared by ranks that are threads of this process."""

    shared_between_processes = True


StoreOf = Callable[[int], ByteStore]
"""The store as one rank sees it."""


def group_of(rank: int, world_size: int, first_global: int = 0) -> GroupRanks:
    """Ranks ``first_global`` and up."""
    return GroupRanks(ranks=tuple(range(first_global, first_global + world_size)), rank=rank)


def _as_it_is(raw: torch.Tensor) -> torch.Tensor:
    return raw


def _twin(entry: Entry, value: Any) -> Any:
    if entry.twin == "view" and type(value) is torch.Tensor:
        return value.view_as(value)
    return value


def _raw_own(own: Own, rank: int, edition: str = "") -> tuple[torch.Tensor, torch.dtype] | None:
    kind = own.by_rank[rank]
    if kind is None:
        return None
    shape, dtype = kind
    return raw_of(f"{own.name} of {rank}{edition}", shape, dtype), dtype


def saved_state(world: World, rank: int, edition: str = "") -> dict[str, Any]:
    """What ``rank`` of the saving job holds; in another ``edition`` all tensors have other
    values."""
    tensors: dict[str, Any] = {}
    for entry in world.entries:
        raw = raw_of(entry.name + edition, entry.shape, entry.dtype)
        held = entry.save.on(rank, world.first_global, raw, entry.dtype, _as_it_is)
        if held is None:
            continue
        tensors[entry.name] = held.value
        if entry.twin is not None:
            tensors[f"{entry.name}_twin"] = _twin(entry, held.value)
    own: dict[str, Any] = {"number": rank}
    for item in world.own:
        if (found := _raw_own(item, rank, edition)) is not None:
            own[item.name] = place(*found, item.memory).tensor
    objects = {o.name: o.value for o in world.objects if rank in o.holders}
    state = {"tensors": tensors, "objects": objects, "own": PerRank(own), "steps": _STEPS}
    # An empty container is a value, which another rank's filled one would contradict.
    return {name: value for name, value in state.items() if value}


def save_job(
    world_size: int,
    state_of: Callable[[int], dict[str, Any]],
    store_of: StoreOf,
    *,
    memories: Sequence[PlanMemory] | None = None,
    planner: DefaultSavePlanner | None = None,
    first_global: int = 0,
    coordinator: int = 0,
    **writer_options: Any,
) -> list[Metadata]:
    """Save ``state_of(rank)`` on every rank; ``memories``: each rank's plans of earlier saves."""

    def on_rank(session: Session) -> Metadata:
        store = store_of(session.rank)
        return save(
            session,
            state_of(session.rank),
            checkpoint_id=None,
            writer=ShardedWriter(lambda _: store, store.url, **writer_options),
            planner=planner,
            group=group_of(session.rank, world_size, first_global),
            world_size=world_size,
            memory=PlanMemory() if memories is None else memories[session.rank],
            options=SaveOptions(deadlines=DEADLINES, coordinator_rank=coordinator),
        )

    return results_of(run_simulated(world_size, on_rank))


def save_world(
    world: World,
    store_of: StoreOf,
    memories: Sequence[PlanMemory] | None = None,
    edition: str = "",
) -> list[Metadata]:
    """The saving job."""
    return save_job(
        world.savers,
        lambda rank: saved_state(world, rank, edition),
        store_of,
        memories=memories,
        planner=DefaultSavePlanner(dedup_save_to_lowest_rank=world.to_lowest_rank),
        first_global=world.first_global,
        coordinator=world.save_coordinator,
        block_size=world.block_size,
        thread_count=world.threads,
    )


@dataclass
class _Destination:
    """What one rank of the loading job hands to ``load``, and what it must find there after."""

    state: dict[str, Any]
    held: dict[str, Held] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    """Expected values; tensors as raw bytes with their dtype; ``_OLD``: as it was."""


def _destination(world: World, rank: int) -> _Destination:
    tensors: dict[str, Any] = {}
    own: dict[str, Any] = {}
    objects = {o.name: _OLD for o in world.objects}
    result = _Destination(
        state={
            "tensors": tensors,
            "objects": objects,
            "own": PerRank(own),
            "steps": [{"step": 0}, {"step": 0, "none": 7}],
        }
    )
    for entry in world.entries:
        raw = raw_of(entry.name, entry.shape, entry.dtype)
        for name, form in ((entry.name, entry.load), (f"{entry.name}_twin", entry.twin_load)):
            if form is None:
                continue
            held = form.on(rank, world.first_global, raw, entry.dtype, flipped)
            if held is not None:
                tensors[name] = held.value
                result.held[name] = held
    result.objects = {o.name: o.value for o in world.objects}
    _own_destination(world, rank, own, result)
    # An empty container is a value of its own, which was not saved.
    empty = {"tensors": tensors, "objects": objects, "own": own}
    for name in [name for name, inside in empty.items() if not inside]:
        del result.state[name]
    return result


def _own_destination(world: World, rank: int, own: dict[str, Any], result: _Destination) -> None:
    if world.savers == world.loaders:
        own["number"] = _OLD
        result.own["number"] = rank
        for item in world.own:
            if (found := _raw_own(item, rank)) is None:
                continue
            raw, dtype = found
            at = place(flipped(raw), dtype, item.memory)
            own[item.name] = at.tensor
            result.held[f"own {item.name}"] = Held(value=at.tensor, places=(at,), expected=(raw,))
        return
    if world.per_rank == "error":
        return
    own["number"] = _OLD
    if world.savers == 1:
        result.own["number"] = 0
    else:
        result.own["number"] = _OLD if world.per_rank == "skip" else list(range(world.savers))
    for item in world.own:
        found_all = [_raw_own(item, r) for r in range(world.savers)]
        stored = [found for found in found_all if found is not None]
        if not stored:
            continue
        if len(stored) == world.savers and all(_same_own(one, stored[0]) for one in stored):
            raw, dtype = stored[0]  # all ranks agree: read as if it were replicated
            at = place(flipped(raw), dtype, item.memory)
            own[item.name] = at.tensor
            result.held[f"own {item.name}"] = Held(value=at.tensor, places=(at,), expected=(raw,))
            continue
        own[item.name] = torch.full((2,), 7)
        result.own[item.name] = own[item.name].clone() if world.per_rank == "skip" else stored


def _same_own(
    one: tuple[torch.Tensor, torch.dtype], other: tuple[torch.Tensor, torch.dtype]
) -> bool:
    return one[1] is other[1] and one[0].shape == other[0].shape and torch.equal(one[0], other[0])


def load_world(world: World, store_of: StoreOf) -> tuple[list[LoadReport], list[str]]:
    """The loading job, and everything that is not as it must be."""
    destinations = [_destination(world, rank) for rank in range(world.loaders)]

    def on_rank(session: Session) -> LoadReport:
        store = store_of(session.rank)
        return load(
            session,
            destinations[session.rank].state,
            checkpoint_id=None,
            reader=ShardedReader(lambda _: store, store.url, thread_count=world.threads),
            planner=DefaultLoadPlanner(),
            group=group_of(session.rank, world.loaders, world.first_global),
            options=LoadOptions(
                deadlines=DEADLINES,
                coordinator_rank=world.load_coordinator,
                per_rank=world.per_rank,
                allow_pickle=True,
            ),
        )

    reports = results_of(run_simulated(world.loaders, on_rank))
    wrong = [
        f"rank {rank}: {what}"
        for rank, destination in enumerate(destinations)
        for what in _differences(destination)
    ]
    return reports, wrong


def _differences(destination: _Destination) -> list[str]:
    state = destination.state
    wrong = []
    for name, held in destination.held.items():
        if (what := held.differs()) is not None:
            wrong.append(f"{name}: {what}")
        if not name.startswith("own ") and state["tensors"][name] is not held.value:
            wrong.append(f"{name}: the tensor was replaced")
    for name, value in destination.objects.items():
        if not same(state["objects"][name], value):
            wrong.append(f"{name}: {state['objects'][name]!r} instead of {value!r}")
    if state["steps"] != _STEPS:
        wrong.append(f"steps: {state['steps']}")
    if destination.own and not isinstance(state["own"], PerRank):
        return [*wrong, "PerRank was lost"]
    for name, value in destination.own.items():
        if not same(_as_raw(state["own"].value[name]), _as_raw(value)):
            wrong.append(f"own {name}: {state['own'].value[name]!r} instead of {value!r}")
    return wrong


def _as_raw(value: Any) -> Any:
    """Tensors as (bytes, dtype), in lists too."""
    if isinstance(value, list):
        return [_as_raw(item) for item in value]
    if isinstance(value, torch.Tensor):
        return _as_raw((value.contiguous().unsqueeze(-1).view(torch.uint8), value.dtype))
    if isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
        return value[0].tolist(), value[1], tuple(value[0].shape)
    return value


def same(one: object, other: object) -> bool:
    """Equality that also compares types, NaNs and the sign of zero."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and isinstance(other, float):
        if math.isnan(one):
            return math.isnan(other)
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
