"""Saves of a few ranks (threads), described so that one ingredient of a plan can be changed.

Belongs here: descriptions of states, the job that saves them again and again with the ranks' plan
memories, and what a load must give back. Does not belong here: what the tests claim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor, Shard

from dcp_engine.coordination.interface import Operation
from dcp_engine.coordination.simulated import run_simulated, simulated_identity
from dcp_engine.coordination.single import SingleSession
from dcp_engine.coordination.store import StoreSession
from dcp_engine.default_planner import DefaultSavePlanner
from dcp_engine.loader import LoadOptions, load
from dcp_engine.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from dcp_engine.plan import TensorWriteData, WriteItem, WriteItemType
from dcp_engine.saver import PlanMemory, SaveOptions, save
from dcp_engine.state.adapters import GroupRanks
from dcp_engine.state.per_rank import PerRank
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.faulty_calls import CallFault, faulty_writer
from tests.meshes import mesh_seen_by
from tests.property.jobs import DEADLINES, SharedMemoryStore, group_of, same

__all__ = ["Job", "Leaf", "Spec", "base"]

Kind = Literal["rows", "columns", "ragged", "swapped", "whole", "own", "object", "own object"]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One value of a state dict."""

    kind: Kind
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    same_as: str | None = None
    """The leaf whose very tensor this is."""
    ranks: frozenset[int] | None = None
    """Only these hold it."""
    differs: bool = False
    """An object that is another one on each rank."""
    longer_on: int | None = None
    """An own tensor has one element more there."""


Spec = dict[str, Leaf]
"""Leaves by path, its parts separated by ``/``; a part ``[i]`` is the i-th of a list."""


def base() -> Spec:
    """Every kind of value."""
    return {
        "model/w": Leaf(kind="rows", shape=(8, 6)),
        "model/v": Leaf(kind="rows", shape=(6,), dtype=torch.bfloat16),
        "model/bias": Leaf(kind="whole", shape=(5, 3)),
        "model/tied": Leaf(kind="whole", shape=(5, 3), same_as="model/bias"),
        "model/other": Leaf(kind="whole", shape=(5, 3)),
        "list/[0]": Leaf(kind="whole", shape=(4,)),
        "own/rng": Leaf(kind="own", shape=(3,), dtype=torch.int64),
        "own/seed": Leaf(kind="own object"),
        "step": Leaf(kind="object"),
    }


@dataclass
class Job:
    """The same processes saving again and again: their plan memories outlive the saves."""

    world_size: int = 2
    capacity: int = 4
    memories: list[PlanMemory] = field(default_factory=list)
    store: SharedMemoryStore = field(default_factory=lambda: SharedMemoryStore("memory://plans"))

    def memory(self, rank: int) -> PlanMemory:
        """Of one rank."""
        while len(self.memories) <= rank:
            self.memories.append(PlanMemory(self.capacity))
        return self.memories[rank]

    def save(
        self,
        spec: Spec,
        *,
        epoch: int = 0,
        world_size: int | None = None,
        coordinator: int = 0,
        to_lowest_rank: bool = False,
        faults: list[CallFault] | None = None,
        lay: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    ) -> list[list[str]]:
        """Save on all ranks; the phases that each rank went through. Raises what rank 0 raised.

        ``lay`` says in what memory a rank's tensors lie; by default in new one each time.
        """
        world_size = world_size or self.world_size
        phases: list[list[str]] = [[] for _ in range(world_size)]
        memories = [self.memory(rank) for rank in range(world_size)]

        def on_rank(session: StoreSession) -> None:
            rank = session.rank
            _watch(session, phases[rank])
            store = self.store
            save(
                session,
                build(spec, rank, world_size, epoch, lay),
                checkpoint_id=None,
                writer=faulty_writer(
                    ShardedWriter(lambda _: store, store.url), faults or [], rank=rank
                ),
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=to_lowest_rank),
                group=group_of(rank, world_size),
                world_size=world_size,
                memory=memories[rank],
                options=SaveOptions(deadlines=DEADLINES, coordinator_rank=coordinator),
            )

        outcomes = run_simulated(world_size, on_rank)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            assert len(errors) == world_size  # all or none
            raise errors[0]
        return phases

    def wrong(self, spec: Spec, *, epoch: int = 0, world_size: int | None = None) -> list[str]:
        """Load what lies there, whole, into one process: the names of what is not ``spec``."""
        world_size = world_size or self.world_size
        into: dict[str, Any] = {}
        expected: dict[str, Any] = {}
        for path, leaf in spec.items():
            _put(into, path, _blank(leaf))
            expected[path] = _expected(path, spec, world_size, epoch)
        if "own" in into:
            into["own"] = PerRank(into["own"])
        store = self.store
        report = load(
            SingleSession(simulated_identity()),
            into,
            checkpoint_id=None,
            reader=ShardedReader(lambda _: store, store.url),
            planner=None,
            group=GroupRanks(),
            options=LoadOptions(deadlines=DEADLINES, per_rank="list"),
        )
        found = {path: _get(into, path) for path in spec}
        wrong = [
            f"{path}: {found[path]} instead of {expected[path]}"
            for path in spec
            if not _equal(found[path], expected[path])
        ]
        return [*wrong, *(f"unexpected {name}" for name in report.unexpected)]


def build(
    spec: Spec,
    rank: int,
    world_size: int,
    epoch: int,
    lay: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """The state dict of one rank."""
    state: dict[str, Any] = {}
    made: dict[str, Any] = {}
    for path, leaf in spec.items():
        if leaf.ranks is not None and rank not in leaf.ranks:
            continue
        if leaf.same_as is not None:
            made[path] = made[leaf.same_as]
        else:
            made[path] = _value(path, leaf, rank, world_size, epoch, lay)
        _put(state, path, made[path])
    if "own" in state:
        state["own"] = PerRank(state["own"])
    return state


def _value(
    path: str,
    leaf: Leaf,
    rank: int,
    world_size: int,
    epoch: int,
    lay: Callable[[torch.Tensor], torch.Tensor],
) -> Any:
    if leaf.kind == "object":
        return f"{path} {epoch}" + (f" on {rank}" if leaf.differs else "")
    if leaf.kind == "own object":
        return f"{path} {epoch} of {rank}"
    if leaf.kind == "own":
        return lay(_own(path, leaf, rank, epoch))
    whole = _whole(path, leaf, epoch)
    if leaf.kind == "whole":
        return lay(whole)
    if leaf.kind == "ragged":
        border = 1
        rows = (0, border) if rank == 0 else (border, leaf.shape[0])
        return Slab(lay(whole[slice(*rows)]), rows[0], leaf.shape) if rank < 2 else None
    dim = 1 if leaf.kind == "columns" else 0
    ranks = list(range(world_size))
    if leaf.kind == "swapped":
        ranks.reverse()
    mesh = mesh_seen_by(rank, ranks)
    parts = torch.chunk(whole, world_size, dim)
    at = ranks.index(rank)
    mine = parts[at] if at < len(parts) else whole.narrow(dim, 0, 0)
    return DTensor.from_local(
        lay(mine), mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


class Slab:
    """Some rows of a tensor, cut as no mesh would; described as ``_Checkpointable`` values are."""

    def __init__(self, local: torch.Tensor, first: int, shape: tuple[int, ...]) -> None:
        self.local = local
        self.offsets = torch.Size([first, *([0] * (len(shape) - 1))])
        self.shape = torch.Size(shape)

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        chunk = ChunkStorageMetadata(offsets=self.offsets, sizes=self.local.shape)
        properties = TensorProperties(dtype=self.local.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, self.offsets, 0),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.local


def _whole(path: str, leaf: Leaf, epoch: int) -> torch.Tensor:
    seed = sum(map(ord, path)) + 17 * epoch
    count = torch.Size(leaf.shape).numel()
    return ((torch.arange(count) * 3 + seed) % 97).reshape(leaf.shape).to(leaf.dtype)


def _own(path: str, leaf: Leaf, rank: int, epoch: int) -> torch.Tensor:
    shape = (leaf.shape[0] + 1, *leaf.shape[1:]) if leaf.longer_on == rank else leaf.shape
    return torch.full(shape, 10 * rank + epoch, dtype=leaf.dtype)


def _expected(path: str, spec: Spec, world_size: int, epoch: int) -> Any:
    leaf = spec[path]
    if leaf.kind == "object":
        return f"{path} {epoch}"
    if leaf.kind == "own object":
        return [f"{path} {epoch} of {rank}" for rank in range(world_size)]
    if leaf.kind == "own":
        return [_own(path, leaf, rank, epoch) for rank in range(world_size)]
    return _whole(leaf.same_as or path, leaf, epoch)


def _blank(leaf: Leaf) -> Any:
    if leaf.kind.endswith("object"):
        return None
    return torch.full(leaf.shape, 98, dtype=leaf.dtype)


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    return same(found, expected)


def _put(state: dict[str, Any], path: str, value: Any) -> None:
    at: Any = state
    parts = path.split("/")
    for part, following in pairwise(parts):
        child: Any = [] if following.startswith("[") else {}
        at = at.setdefault(part, child)
    if parts[-1].startswith("["):
        at.append(value)
    else:
        at[parts[-1]] = value


def _get(state: Mapping[str, Any], path: str) -> Any:
    at: Any = state
    for part in path.split("/"):
        at = at.value if isinstance(at, PerRank) else at
        at = at[int(part[1:-1])] if part.startswith("[") else at[part]
    return at


def _watch(session: StoreSession, phases: list[str]) -> None:
    """Note the steps of all operations of ``session``."""
    begin = session.begin

    def begin_watched(*args: Any, **kwargs: Any) -> Operation:
        operation = begin(*args, **kwargs)
        step = operation.step

        def noted(phase: str, *args: Any, **kwargs: Any) -> tuple[bytes, bytes]:
            phases.append(phase)
            return step(phase, *args, **kwargs)

        operation.step = noted  # type: ignore[method-assign]
        return operation

    session.begin = begin_watched  # type: ignore[method-assign,assignment]
