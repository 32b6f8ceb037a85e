"""The digest of a local plan: the same for the same plan, another for any other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from dcp_engine.planning.columns import (
    NO_ALIAS,
    UNDECIDED_ALIAS,
    Chunks,
    LocalPlan,
    ObjectTable,
    TensorTable,
)
from dcp_engine.planning.fingerprint import DIGEST_BYTES, Options, fingerprint
from dcp_engine.state.values import EntryKind, Value
from tests.planning.layouts import obj, per_rank, replicated, sharded, source, states

OPTIONS: Options = {"world_size": 4, "coordinator_rank": 0, "dedup_to_lowest_rank": False}


def plan(rank: int = 1) -> LocalPlan:
    """One of each: shard, second shard, replica, tie, own tensor, objects."""
    values: list[Value] = [
        sharded("model.w", (8, 6), rank, [4], [0]),
        sharded("model.v", (6, 8), rank, [2, 2], [0, 1], dtype=torch.bfloat16),
        replicated("model.bias", (5,)),
        replicated("model.tied", (5,)),
        per_rank("rng", (3,), dtype=torch.int64),
        obj("step"),
        obj("seed", EntryKind.PER_RANK),
    ]
    return source(values, rank, aliases=[NO_ALIAS] * 3 + [2, NO_ALIAS]).plan


def tensors(field: str, row: Any, value: Any) -> Callable[[LocalPlan], LocalPlan]:
    def change(before: LocalPlan) -> LocalPlan:
        column = np.array(getattr(before.tensors, field))
        column[row] = value
        return replace(before, tensors=replace(before.tensors, **{field: column}))

    return change


def names(*changed: str) -> Callable[[LocalPlan], LocalPlan]:
    def change(before: LocalPlan) -> LocalPlan:
        kept = before.tensors.names[len(changed) :]
        return replace(before, tensors=replace(before.tensors, names=(*changed, *kept)))

    return change


def chunks(field: str, row: Any, value: Any) -> Callable[[LocalPlan], LocalPlan]:
    def change(before: LocalPlan) -> LocalPlan:
        column = np.array(getattr(before.chunks, field))
        column[row] = value
        return replace(before, chunks=replace(before.chunks, **{field: column}))

    return change


def aliases(row: int, value: int) -> Callable[[LocalPlan], LocalPlan]:
    def change(before: LocalPlan) -> LocalPlan:
        column = np.array(before.aliases)
        column[row] = value
        return replace(before, aliases=column)

    return change


def objects(**columns: Any) -> Callable[[LocalPlan], LocalPlan]:
    return lambda before: replace(before, objects=replace(before.objects, **columns))


def without_last_chunk(before: LocalPlan) -> LocalPlan:
    kept = before.chunks
    return replace(
        before,
        chunks=Chunks(tensor=kept.tensor[:-1], offsets=kept.offsets[:-1], sizes=kept.sizes[:-1]),
    )


def wider(before: LocalPlan) -> LocalPlan:
    """The same table with its columns cut differently."""
    shapes = before.tensors.shapes.reshape(2, -1)
    return replace(before, tensors=replace(before.tensors, shapes=shapes))


CHANGES: dict[str, Callable[[LocalPlan], LocalPlan]] = {
    "name": names("model.x"),
    "names exchanged": names("model.v", "model.w"),
    "names cut elsewhere": names("model.", "wmodel.v"),
    "name with a separator": names("model.w\0"),
    "kind": tensors("kinds", 2, EntryKind.SHARDED),
    "dtype": tensors("dtypes", 0, 7),
    "dimensions": tensors("ndims", 0, 1),
    "shape": tensors("shapes", (0, 0), 9),
    "shape, other dimension": tensors("shapes", (1, 1), 9),
    "shape, cut differently": wider,
    "owner": tensors("owners", 4, 2),
    "tensor of a chunk": chunks("tensor", 0, 1),
    "offset": chunks("offsets", (0, 0), 4),
    "offset, other dimension": chunks("offsets", (1, 1), 1),
    "size": chunks("sizes", (0, 0), 1),
    "size, other dimension": chunks("sizes", (1, 1), 2),
    "a chunk less": without_last_chunk,
    "tie cut": aliases(3, NO_ALIAS),
    "tie made": aliases(1, 0),
    "tie undecided": aliases(3, UNDECIDED_ALIAS),
    "object name": objects(names=("stop", "seed")),
    "object names cut elsewhere": objects(names=("ste", "pseed")),
    "object kind": objects(kinds=np.array([EntryKind.PER_RANK] * 2, np.uint8)),
    "object owner": objects(owners=np.array([0, -1], np.int32)),
    "object missing": objects(
        names=("step",), kinds=np.zeros(1, np.uint8), owners=np.full(1, -1, np.int32)
    ),
    "nesting": lambda before: replace(before, containers=before.containers + b" "),
}

OTHER_OPTIONS: list[Options] = [
    {**OPTIONS, "world_size": 5},
    {**OPTIONS, "coordinator_rank": 1},
    {**OPTIONS, "dedup_to_lowest_rank": True},
    {**OPTIONS, "files_per_rank": 2},
    {"world_size": 4, "coordinator_rank": 0},
    {},
]


@pytest.mark.parametrize("what", CHANGES)
def test_it_changes_with(what: str) -> None:
    assert fingerprint(CHANGES[what](plan()), OPTIONS) != fingerprint(plan(), OPTIONS)


def test_no_two_changes_look_alike() -> None:
    digests = {fingerprint(change(plan()), OPTIONS) for change in CHANGES.values()}
    assert len(digests) == len(CHANGES)


def test_every_column_is_changed_above() -> None:
    """A column that somebody adds to a plan has to come into the digest, and in here."""
    assert set(TensorTable.__dataclass_fields__) == {
        "names", "kinds", "dtypes", "ndims", "shapes", "owners",
    }  # fmt: skip
    assert set(Chunks.__dataclass_fields__) == {"tensor", "offsets", "sizes"}
    assert set(ObjectTable.__dataclass_fields__) == {"names", "kinds", "owners"}
    assert set(LocalPlan.__dataclass_fields__) == {
        "tensors", "chunks", "aliases", "objects", "containers",
    }  # fmt: skip


@pytest.mark.parametrize("options", OTHER_OPTIONS)
def test_it_changes_with_options(options: Options) -> None:
    assert fingerprint(plan(), options) != fingerprint(plan(), OPTIONS)


def test_it_tells_values_of_options_apart_by_type() -> None:
    values: list[Any] = [1, True, 1.0, "1", None]
    assert len({fingerprint(plan(), {"option": value}) for value in values}) == len(values)


def test_ranks_differ_by_what_they_hold() -> None:
    assert len({fingerprint(plan(rank), OPTIONS) for rank in range(4)}) == 4


def test_the_order_of_options_does_not_matter() -> None:
    turned = dict(reversed(OPTIONS.items()))
    assert fingerprint(plan(), turned) == fingerprint(plan(), OPTIONS)


def test_memory_order_does_not_matter() -> None:
    before = plan()
    table = replace(before.tensors, shapes=np.asfortranarray(before.tensors.shapes))
    columns = replace(
        before.chunks,
        offsets=np.asfortranarray(before.chunks.offsets),
        sizes=np.asfortranarray(before.chunks.sizes),
    )
    turned = replace(before, tensors=table, chunks=columns)
    assert fingerprint(turned, OPTIONS) == fingerprint(before, OPTIONS)


def test_it_is_the_same_in_every_process() -> None:
    """Ranks compare digests that other processes made; nothing of a process may come in."""
    code = (
        "from tests.planning.test_fingerprint import OPTIONS, plan;"
        "from dcp_engine.planning.fingerprint import fingerprint;"
        "print(fingerprint(plan(), OPTIONS).hex())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "123", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == fingerprint(plan(), OPTIONS).hex()
    assert len(told.stdout.strip()) == 2 * DIGEST_BYTES


@given(states(), states())
def test_equal_digests_mean_equal_plans(one: list[list[Value]], two: list[list[Value]]) -> None:
    plans = [source(values, rank).plan for state in (one, two) for rank, values in enumerate(state)]
    again = [source(values, rank).plan for state in (one, two) for rank, values in enumerate(state)]
    digests = [fingerprint(p, OPTIONS) for p in plans]
    assert digests == [fingerprint(p, OPTIONS) for p in again]
    contents = [_content(p) for p in plans]
    for at, content in enumerate(contents):
        for other in range(at):
            assert (content == contents[other]) == (digests[at] == digests[other])


def _content(of: LocalPlan) -> list[object]:
    columns = [
        *(getattr(of.tensors, f) for f in ("kinds", "dtypes", "ndims", "shapes", "owners")),
        *(of.chunks.tensor, of.chunks.offsets, of.chunks.sizes, of.aliases),
        *(of.objects.kinds, of.objects.owners),
    ]
    plain: list[object] = [(column.shape, column.tolist()) for column in columns]
    return [*plain, of.tensors.names, of.objects.names, of.containers]
