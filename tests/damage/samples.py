"""Small checkpoints of every kind, in memory, and what reads of them must give.

Belongs here: saving them, reading them in full and in part, and comparing. Does not belong here:
how files are changed (``changes``), and what is claimed (the test).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import dcp_engine as dcp
from dcp_engine.coordination.interface import Session
from dcp_engine.coordination.simulated import results_of, run_simulated
from dcp_engine.default_planner import DefaultSavePlanner
from dcp_engine.loader.random_access import Checkpoint, LazyObject, LazyTensor
from dcp_engine.loader.verify import verify_checkpoint
from dcp_engine.metadata import Metadata
from dcp_engine.saver import PlanMemory, SaveOptions
from dcp_engine.saver import save as save_on_rank
from dcp_engine.state.per_rank import PerRank
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from tests.property.forms import Sharded
from tests.property.jobs import DEADLINES, SharedMemoryStore, group_of, same

__all__ = ["SAMPLES", "Sample", "read_full", "read_slices", "read_some", "read_verify"]

BLOCK = 512
EXTRA = {"config.json": b'{"layers": 2}', "notes/a": b"some notes " * 60}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How a checkpoint is made. ``values`` are whole tensors and objects, by top-level key."""

    world_size: int
    values: Mapping[str, Any]
    sharded: bool = False
    own: bool = False
    """Whether each rank has values of its own besides."""
    extra: Mapping[str, bytes]
    use_collectives: bool = True

    def save(self, edition: int) -> SharedMemoryStore:
        """The checkpoint; each edition has other values, and a save id of its own."""
        store = SharedMemoryStore()

        def on_rank(session: Session) -> Metadata:
            return save_on_rank(
                session,
                self._state(session.rank, edition),
                checkpoint_id=None,
                writer=ShardedWriter(lambda _: store, store.url, block_size=BLOCK),
                planner=DefaultSavePlanner(),
                group=group_of(session.rank, self.world_size),
                world_size=self.world_size,
                memory=PlanMemory(),
                options=SaveOptions(
                    deadlines=DEADLINES,
                    extra_files=self.extra_of(edition) if session.rank == 0 else {},
                    use_collectives=self.use_collectives,
                    save_id=None if self.use_collectives else f"{edition + 1:032x}",
                ),
            )

        results_of(run_simulated(self.world_size, on_rank))
        return store

    def _state(self, rank: int, edition: int) -> dict[str, Any]:
        state = {name: edited(value, edition) for name, value in self.values.items()}
        if self.sharded:
            whole = state["w"]
            form = Sharded(
                mesh=(self.world_size,),
                ranks=tuple(range(self.world_size)),
                placements=(torch.distributed.tensor.Shard(0),),
                order=(0,),
            )
            raw = whole.unsqueeze(-1).view(torch.uint8).reshape(*whole.shape, whole.itemsize)
            held = form.on(rank, 0, raw, whole.dtype, lambda part: part)
            assert held is not None
            state["w"] = held.value
        if self.own:
            state["own"] = PerRank(self.own_of(rank, edition))
        return state

    def expected(self) -> dict[str, Any]:
        """The values of edition 0."""
        return {name: edited(value, 0) for name, value in self.values.items()}

    def own_of(self, rank: int, edition: int) -> dict[str, Any]:
        """What is ``rank``'s own; of one shape on all ranks."""
        return {
            "rng": torch.arange(700, dtype=torch.int32).to(torch.uint8) + (rank + 3 * edition),
            "seed": rank + 10 * edition,
            "log": chr(97 + rank + edition) * 4500,
        }

    def extra_of(self, edition: int) -> dict[str, bytes]:
        return {name: data + b"%d" % edition for name, data in self.extra.items()}


def edited(value: Any, edition: int) -> Any:
    """Another value of the same type and size."""
    if isinstance(value, torch.Tensor):
        return value ^ True if value.dtype is torch.bool and edition else value + edition
    if isinstance(value, str):
        return value[:-1] + chr(97 + edition)
    return value + edition


_VALUES = {
    "w": torch.arange(300, dtype=torch.float32).reshape(20, 15),
    "h": torch.arange(7, dtype=torch.int16),
    "inline": 12,
    "blob": "b" * 5000,
}
SAMPLES = {
    "one rank": Sample(world_size=1, values={"w": _VALUES["w"], "inline": 12}, extra={}),
    "two ranks": Sample(world_size=2, values=_VALUES, sharded=True, extra={}),
    "per rank": Sample(world_size=2, values={"h": _VALUES["h"]}, own=True, extra={}),
    "collective-free": Sample(
        world_size=2, values=_VALUES, sharded=True, own=True, extra=EXTRA, use_collectives=False
    ),
    "extra files": Sample(world_size=1, values=_VALUES, own=True, extra=EXTRA),
}

Place = SharedMemoryStore


def reader(store: Place) -> ShardedReader:
    return ShardedReader(lambda _: store, store.url, thread_count=1)


Reading = Callable[[Place, Sample], Iterator[Callable[[], bool]]]
"""Attempts that read, each for itself, and say whether everything is what was saved."""


def read_full(store: Place, sample: Sample) -> Iterator[Callable[[], bool]]:
    """A load of all keys, and all extra files."""

    def attempt() -> bool:
        expected = sample.expected()
        extra = sample.extra_of(0)
        into = {name: blank(value) for name, value in expected.items()}
        if sample.own:
            into["own"] = PerRank({n: blank(v) for n, v in sample.own_of(0, 0).items()})
        _load(store, into)
        if sample.own:
            expected["own"] = _own_as_loaded(sample)
            into["own"] = into["own"].value
        with _opened(store) as opened:
            found = {name: opened.read_extra(name) for name in opened.extra_names}
        return equal(into, expected) and found == extra

    yield attempt


def read_some(store: Place, sample: Sample) -> Iterator[Callable[[], bool]]:
    """Loads of one key, each by itself."""
    for name, value in sample.expected().items():

        def attempt(name: str = name, value: Any = value) -> bool:
            into = {name: blank(value)}
            _load(store, into)
            return equal(into, {name: value})

        yield attempt


def read_slices(store: Place, sample: Sample) -> Iterator[Callable[[], bool]]:
    """Parts of every tensor and every object of an open checkpoint, each by itself."""

    def attempt_of(pick: Callable[[Checkpoint], Any], value: Any) -> Callable[[], bool]:
        def attempt() -> bool:
            with _opened(store) as opened:
                handle: LazyTensor | LazyObject = pick(opened)
                if isinstance(handle, LazyObject):
                    return equal(handle.load(), value)
                return equal(handle[1:3], value[1:3]) and equal(handle[-1], value[-1])

        return attempt

    for name, value in sample.expected().items():
        yield attempt_of(lambda opened, name=name: opened[name], value)
    if sample.own:
        for rank in range(sample.world_size):
            for name, value in sample.own_of(rank, 0).items():
                yield attempt_of(
                    lambda opened, name=name, rank=rank: opened.per_rank(f"own.{name}")[rank],
                    value,
                )


def read_verify(store: Place, sample: Sample) -> Iterator[Callable[[], bool]]:
    """A full verification, which compares no values: it must find what a load finds."""

    def attempt() -> bool:
        with _opened(store) as opened:
            return verify_checkpoint(opened, store.url, "full").bytes_read > 0

    yield attempt


def _load(store: Place, into: dict[str, Any]) -> None:
    dcp.load(into, storage_reader=reader(store), no_dist=True, timeout=60, per_rank="list")


def _opened(store: Place) -> Checkpoint:
    return Checkpoint(reader(store), store.url)


def _own_as_loaded(sample: Sample) -> dict[str, Any]:
    by_rank = [sample.own_of(rank, 0) for rank in range(sample.world_size)]
    if len(by_rank) == 1:
        return by_rank[0]
    return {name: [own[name] for own in by_rank] for name in by_rank[0]}


def blank(value: Any) -> Any:
    """A destination for ``value`` that differs from it everywhere."""
    return ~value if _is_integer(value) else -1 - value if isinstance(value, torch.Tensor) else None


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def equal(one: Any, other: Any) -> bool:
    """Also in type, and bit for bit in floats."""
    if isinstance(other, torch.Tensor):
        return (
            isinstance(one, torch.Tensor)
            and one.dtype is other.dtype
            and one.shape == other.shape
            and torch.equal(one, other)
        )
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in other)
    if isinstance(other, list):
        return isinstance(one, list) and len(one) == len(other) and all(map(equal, one, other))
    return same(one, other)
