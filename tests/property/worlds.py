"""Random jobs: what is saved on N ranks, in which forms, and in which it is loaded on M.

Belongs here: hypothesis strategies and the data classes they draw. Does not belong here: running
them (``jobs``).
"""

from __future__ import annotations

import collections
import datetime
import fractions
import math
import pathlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_engine.format.dtypes import DTYPES
from tests.property.bytes_of import Memory
from tests.property.forms import Box, Boxes, Form, Sharded, Whole

__all__ = [
    "MAX_RANKS",
    "Entry",
    "Own",
    "SavedObject",
    "World",
    "examples",
    "one_tensor",
    "strided",
    "worlds",
]

MAX_RANKS = 8


def examples(in_tests: int) -> int:
    """How many to try: as many as the test run has time for, or ten times that in the profile
    ``explore``."""
    return in_tests * (10 if settings.get_current_profile_name() == "explore" else 1)


_COMMON = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
_ALL = [entry.dtype for entry in DTYPES.values()]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor. ``twin``: it stands in the state dict a second time, under the name with
    ``_twin`` behind, as the same object or as a view of the same memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    save: Form
    load: Form | None
    """None: the load does not ask for it."""
    twin: Literal["same", "view"] | None = None
    twin_load: Form | None = None


@dataclass(frozen=True, kw_only=True)
class SavedObject:
    """One value that is not a tensor, the same on all ranks that hold it."""

    name: str
    value: Any
    holders: frozenset[int]
    pickled: bool


@dataclass(frozen=True, kw_only=True)
class Own:
    """A tensor of each rank's own: shape and dtype by saving rank (None: that rank has none)."""

    name: str
    by_rank: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class World:
    """One job that saves and one that loads."""

    savers: int
    loaders: int
    entries: tuple[Entry, ...]
    objects: tuple[SavedObject, ...]
    own: tuple[Own, ...]
    per_rank: Literal["error", "skip", "list"]
    save_coordinator: int
    load_coordinator: int
    first_global: int
    """Global rank of the group's first rank."""
    block_size: int
    threads: int
    to_lowest_rank: bool


_memories = st.sampled_from(["contiguous", "contiguous", "permuted", "window"])
_shapes = st.lists(st.sampled_from([0, 1, 1, *range(2, 10), 25]), max_size=4).map(tuple)


def _some(ranks: int) -> st.SearchStrategy[frozenset[int]]:
    """All ranks, or some of them."""
    everybody = st.just(frozenset(range(ranks)))
    return everybody | st.frozensets(st.integers(0, ranks - 1), min_size=1)


@st.composite
def _sharded(draw: st.DrawFn, shape: tuple[int, ...], ranks: int) -> Sharded:
    mesh: list[int] = []
    room = ranks
    for _ in range(draw(st.integers(1, 3))):
        mesh.append(draw(st.sampled_from([n for n in (2, 3, 4, 2, 1, room) if n <= room])))
        room //= mesh[-1]
    members = draw(st.permutations(range(ranks)))[: math.prod(mesh)]
    placement: st.SearchStrategy[Placement] = st.just(Replicate())
    if shape:
        placement = placement | st.integers(0, len(shape) - 1).map(Shard)
    placements = [draw(placement) for _ in mesh]
    plain = Sharded(
        mesh=tuple(mesh),
        ranks=tuple(members),
        placements=tuple(placements),
        order=tuple(range(len(mesh))),
        memory=draw(_memories),
    )
    if len(mesh) < 2 or not shape or draw(st.booleans()):
        return plain
    i, j = sorted(draw(st.permutations(range(len(mesh))))[:2])
    return _strided(plain, shape, i, j, draw(st.integers(0, len(shape) - 1)))


def _strided(plain: Sharded, shape: tuple[int, ...], i: int, j: int, d: int) -> Sharded:
    """Mesh dimension ``i`` cuts dimension ``d`` after ``j`` has, as FSDP does over tensor
    parallelism; ``plain`` where that cannot be told from another cut."""
    mesh, placements = plain.mesh, list(plain.placements)
    for k, other in enumerate(placements):
        if isinstance(other, Shard) and other.dim == d:
            placements[k] = Replicate()
    placements[i], placements[j] = _StridedShard(d, split_factor=mesh[j]), Shard(d)
    order = [k for k in range(len(mesh)) if k != i]
    order.insert(order.index(j) + 1, i)
    strided = replace(plain, placements=tuple(placements), order=tuple(order))
    return plain if strided.is_ambiguous(shape) else strided


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], Sharded]:
    """A shape of uneven sizes, and a strided layout over 8 ranks."""
    mesh = draw(st.sampled_from([(4, 2), (2, 4), (2, 2, 2), (3, 2)]))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 3)))
    plain = Sharded(
        mesh=mesh,
        ranks=tuple(draw(st.permutations(range(MAX_RANKS)))[: math.prod(mesh)]),
        placements=(Replicate(),) * len(mesh),
        order=tuple(range(len(mesh))),
    )
    i, j = sorted(draw(st.permutations(range(len(mesh))))[:2])
    return shape, _strided(plain, shape, i, j, 0)


@st.composite
def _boxes(draw: st.DrawFn, shape: tuple[int, ...], ranks: int) -> Boxes:
    tiles: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        at = draw(st.integers(0, len(tiles) - 1))
        dim = draw(st.integers(0, len(shape) - 1))
        offsets, sizes = tiles[at]
        if sizes[dim] < 2:
            continue
        cut = draw(st.integers(1, sizes[dim] - 1))
        low, high = list(sizes), list(sizes)
        low[dim], high[dim] = cut, sizes[dim] - cut
        further = list(offsets)
        further[dim] += cut
        tiles[at : at + 1] = [(offsets, tuple(low)), (tuple(further), tuple(high))]
    holders = st.frozensets(st.integers(0, ranks - 1), min_size=1, max_size=2)
    return Boxes(
        shape=shape, parts=tuple((tile, draw(holders)) for tile in tiles), memory=draw(_memories)
    )


@st.composite
def _form(draw: st.DrawFn, shape: tuple[int, ...], ranks: int) -> Form:
    kind = draw(st.sampled_from(["sharded", "sharded", "sharded", "whole", "boxes"]))
    if kind == "sharded":
        return draw(_sharded(shape, ranks))
    if kind == "boxes":
        return draw(_boxes(shape, ranks))
    return Whole(holders=draw(_some(ranks)), memory=draw(_memories))


@st.composite
def _entry(draw: st.DrawFn, name: str, savers: int, loaders: int) -> Entry:
    shape = draw(_shapes)
    twin = draw(st.sampled_from([None, None, "same", "view"]))
    return Entry(
        name=name,
        shape=shape,
        dtype=draw(st.sampled_from(_COMMON) | st.sampled_from(_ALL)),
        save=draw(_form(shape, savers)),
        load=draw(_form(shape, loaders) | _form(shape, loaders) | st.none()),
        twin=twin,
        twin_load=draw(_form(shape, loaders)) if twin is not None else None,
    )


_EXACT: list[Any] = [
    None, True, -(1 << 70), math.nan, -0.0, math.inf, 1 + 2j, "é\n", b"\0\xff", bytes(5000),
    bytearray(b"ab"), (1, (2, "x")), [1, [2.5, None]], [], (), {}, {1, 2}, frozenset({"a"}),
    range(3, 9, 2), torch.Size([2, 3]), torch.float8_e5m2, torch.device("cpu", 1),
    np.float32(1.5), np.arange(6, dtype=">i2").reshape(2, 3), np.zeros((0, 3)), np.arange(900.0),
    datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC), datetime.timedelta(days=-1),
    pathlib.PurePosixPath("a/../b"), "x" * 4096, "y" * 4097, list(range(3000)),
    math.pi,
]  # fmt: skip
_PICKLED: list[Any] = [collections.deque([1, 2]), fractions.Fraction(1, 3)]


@st.composite
def _object(draw: st.DrawFn, name: str, savers: int) -> SavedObject:
    pickled = draw(st.integers(0, 7)) == 0
    text = st.text(st.characters(), max_size=8)
    plain = st.sampled_from(_EXACT) | st.integers() | st.floats() | text | st.binary(max_size=8)
    return SavedObject(
        name=name,
        value=draw(st.sampled_from(_PICKLED) if pickled else plain),
        holders=draw(_some(savers)),
        pickled=pickled,
    )


@st.composite
def _own(draw: st.DrawFn, name: str, savers: int) -> Own:
    kinds = st.tuples(_shapes, st.sampled_from(_COMMON))
    by_rank = [draw(kinds | kinds | st.none()) for _ in range(savers)]
    return Own(name=name, by_rank=tuple(by_rank), memory=draw(_memories))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Any job."""
    savers = draw(st.integers(1, MAX_RANKS))
    loaders = draw(st.just(savers) | st.integers(1, MAX_RANKS))
    count = draw(st.integers(0, 5))
    return World(
        savers=savers,
        loaders=loaders,
        entries=tuple(draw(_entry(f"t{i}", savers, loaders)) for i in range(count)),
        objects=tuple(draw(_object(f"o{i}", savers)) for i in range(draw(st.integers(0, 3)))),
        own=tuple(draw(_own(f"p{i}", savers)) for i in range(draw(st.integers(0, 2)))),
        per_rank=draw(st.sampled_from(["error", "skip", "list"])),
        save_coordinator=draw(st.integers(0, savers - 1)),
        load_coordinator=draw(st.integers(0, loaders - 1)),
        first_global=draw(st.sampled_from([0, 0, 5])),
        block_size=draw(st.sampled_from([512, 1 << 16])),
        threads=draw(st.sampled_from([1, 1, 3])),
        to_lowest_rank=draw(st.booleans()),
    )


def one_tensor(
    shape: tuple[int, ...], save: Form, load: Form, *, savers: int, loaders: int, **changes: Any
) -> World:
    """A job with one float32 tensor."""
    entry = Entry(name="t", shape=shape, dtype=torch.float32, save=save, load=load)
    plain = World(
        savers=savers,
        loaders=loaders,
        entries=(entry,),
        objects=(),
        own=(),
        per_rank="error",  # asks for none
        save_coordinator=0,
        load_coordinator=0,
        first_global=0,
        block_size=512,
        threads=1,
        to_lowest_rank=False,
    )
    return replace(plain, **changes)
