"""Values of many ranks for planning tests: meshes and placements without process groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from dcp_engine.planning.columns import NO_ALIAS, LocalPlan
from dcp_engine.planning.local import LocalSource, make_local_plan
from dcp_engine.state.values import Box, EntryKind, ObjectValue, TensorValue, Value

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.complex128)


def content(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose elements tell where they are from."""
    return torch.arange(math.prod(shape)).reshape(tuple(shape)).to(dtype)


def part(
    value_shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[int | None], at: int
) -> Box:
    """The box of mesh position ``at``; ``cuts[m]`` is the tensor dimension that mesh dimension
    ``m`` shards, or None where it replicates. Cut as ``torch.chunk`` does."""
    offsets, sizes = [0] * len(value_shape), list(value_shape)
    for size, cut, index in zip(mesh, cuts, np.unravel_index(at, mesh), strict=True):
        if cut is None:
            continue
        full = -(-sizes[cut] // size)
        begin = min(sizes[cut], full * int(index))
        end = min(sizes[cut], begin + full)
        offsets[cut] += begin
        sizes[cut] = end - begin
    return Box(offsets=tuple(offsets), sizes=tuple(sizes))


def tensor(
    fqn: str,
    shape: Sequence[int],
    boxes: Sequence[Box],
    *,
    dtype: torch.dtype = torch.float32,
    kind: EntryKind = EntryKind.SHARDED,
) -> TensorValue:
    whole = content(shape, dtype)
    boxes = [box for box in boxes if 0 not in box.sizes]
    return TensorValue(
        fqn=fqn,
        kind=kind,
        dtype=dtype,
        shape=tuple(shape),
        boxes=tuple(boxes),
        tensors=tuple(
            whole[tuple(slice(o, o + s) for o, s in zip(b.offsets, b.sizes, strict=True))]
            if len(shape)
            else whole
            for b in boxes
        ),
    )


def sharded(
    fqn: str,
    shape: Sequence[int],
    rank: int,
    mesh: Sequence[int],
    cuts: Sequence[int | None],
    *,
    dtype: torch.dtype = torch.float32,
) -> TensorValue:
    return tensor(fqn, shape, [part(shape, mesh, cuts, rank)], dtype=dtype)


def replicated(
    fqn: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32
) -> TensorValue:
    whole = Box(offsets=(0,) * len(shape), sizes=tuple(shape))
    return tensor(fqn, shape, [whole], dtype=dtype, kind=EntryKind.REPLICATED)


def per_rank(fqn: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> TensorValue:
    whole = Box(offsets=(0,) * len(shape), sizes=tuple(shape))
    return tensor(fqn, shape, [whole], dtype=dtype, kind=EntryKind.PER_RANK)


def obj(fqn: str, kind: EntryKind = EntryKind.REPLICATED) -> ObjectValue:
    return ObjectValue(fqn=fqn, kind=kind, value=1)


def source(
    values: Sequence[Value], rank: int = 0, *, aliases: Sequence[int] | None = None
) -> LocalSource:
    count = sum(isinstance(value, TensorValue) for value in values)
    shared = [NO_ALIAS] * count if aliases is None else aliases
    return make_local_plan(values, np.array(shared, np.int32), NESTING, rank=rank)


NESTING = b'{"containers":{"parents":[],"keys":[],"kinds":""},"leaves":{"parents":[],"keys":[]}}'


def local_plans(ranks: Sequence[Sequence[Value]]) -> list[LocalPlan]:
    return [source(values, rank).plan for rank, values in enumerate(ranks)]


@st.composite
def states(draw: st.DrawFn) -> list[list[Value]]:
    """The values of 1 to 8 ranks that fit together: meshes of one or two dimensions, some over a
    part of the ranks, replicated and per-rank tensors, objects."""
    world = draw(st.integers(1, 8))
    ranks: list[list[Value]] = [[] for _ in range(world)]
    for number in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        name = draw(st.sampled_from(["layer.", "état.", ""])) + f"t{number}"
        what = draw(st.sampled_from(["sharded", "sharded", "sharded", "replicated", "own"]))
        if what == "replicated":
            holders = draw(st.sets(st.integers(0, world - 1), min_size=1))
            for rank in sorted(holders):
                ranks[rank].append(replicated(name, shape, dtype=dtype))
            continue
        if what == "own":
            holders = draw(st.sets(st.integers(0, world - 1), min_size=1))
            for rank in sorted(holders):
                own = [*shape, draw(st.integers(1, 3))]
                ranks[rank].append(per_rank(name, own, dtype=dtype))
            continue
        meshes = [
            mesh
            for mesh in itertools.product(range(1, world + 1), repeat=2)
            if math.prod(mesh) <= world
        ]
        mesh = draw(st.sampled_from(meshes))
        dims: list[int | None] = [None, *range(len(shape))]
        cuts = [draw(st.sampled_from(dims)) for _ in mesh]
        members = draw(st.permutations(range(world)))[: math.prod(mesh)]
        for rank in range(world):
            if rank in members:
                value = sharded(name, shape, members.index(rank), mesh, cuts, dtype=dtype)
                ranks[rank].append(value)
            elif draw(st.booleans()):
                ranks[rank].append(tensor(name, shape, [], dtype=dtype))
    for number in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from([EntryKind.REPLICATED, EntryKind.PER_RANK]))
        for rank in sorted(draw(st.sets(st.integers(0, world - 1), min_size=1))):
            ranks[rank].append(obj(f"o{number}", kind))
    return ranks
