"""Plans of earlier saves: used when nothing has changed, on all ranks alike, and never else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine.saver.agreement as agreement
from dcp_engine import CheckpointException, Engine, FileSystemReader, FileSystemWriter
from dcp_engine.saver.compare import ReplicasDifferWarning
from storage_backends.testing.faulty_calls import CallFault
from tests.saver.plan_jobs import Job, Leaf, Spec, base

PLANNED = ["agree", "plan", "write"]
REUSED = ["agree", "write"]


class Boom(Exception):
    """What the injected faults raise."""


def changed(change: Callable[[Spec], None]) -> Spec:
    spec = base()
    change(spec)
    return spec


def on(path: str, **attributes: Any) -> Callable[[Spec], None]:
    """Change attributes of one leaf."""

    def change(spec: Spec) -> None:
        spec[path] = replace(spec[path], **attributes)

    return change


def add(path: str, leaf: Leaf) -> Callable[[Spec], None]:
    return lambda spec: spec.__setitem__(path, leaf)


def drop(path: str) -> Callable[[Spec], None]:
    return lambda spec: spec.__delitem__(path)


def rename(old: str, new: str) -> Callable[[Spec], None]:
    """The leaf keeps its place in the order."""

    def change(spec: Spec) -> None:
        leaves = [(new if path == old else path, leaf) for path, leaf in spec.items()]
        spec.clear()
        spec.update(leaves)

    return change


def reorder(spec: Spec) -> None:
    leaves = list(spec.items())
    spec.clear()
    spec.update(leaves[4:] + leaves[:4])


ON_ALL_RANKS: dict[str, Callable[[Spec], None]] = {
    "dtype of a shard": on("model/w", dtype=torch.float64),
    "dtype of the same size": on("model/v", dtype=torch.float16),
    "dtype of a replica": on("list/[0]", dtype=torch.int32),
    "shape of a shard": on("model/w", shape=(8, 7)),
    "shape with as many elements": on("model/w", shape=(16, 3)),
    "shape of a replica": on("list/[0]", shape=(2, 2)),
    "placement": on("model/w", kind="columns"),
    "order of the ranks in the mesh": on("model/w", kind="swapped"),
    "boxes": on("model/w", kind="ragged"),
    "shards to replicas": on("model/w", kind="whole"),
    "replicas to shards": on("model/other", kind="rows", shape=(5, 3)),
    "a new tensor": add("model/new", Leaf(kind="whole", shape=(2,))),
    "a new shard": add("model/new", Leaf(kind="rows", shape=(4,))),
    "an empty tensor": add("model/new", Leaf(kind="whole", shape=(0,))),
    "a missing tensor": drop("model/v"),
    "another name": rename("model/v", "model/x"),
    "a name moved to another tensor": on("model/v", shape=(8, 6)),
    "a tie cut": on("model/tied", same_as=None),
    "a tie made": on("model/other", same_as="model/bias"),
    "a tie of shards": add("model/z", Leaf(kind="rows", shape=(8, 6), same_as="model/w")),
    "a new object": add("job", Leaf(kind="object")),
    "a missing object": drop("step"),
    "a tensor became an object": on("list/[0]", kind="object"),
    "an object became a tensor": on("step", kind="whole", shape=(3,)),
    "a list became a dict": rename("list/[0]", "list/0"),
    "keys became deeper": rename("model/other", "model.other"),
    "order of the keys": reorder,
    "shape of an own tensor": on("own/rng", shape=(4,)),
    "dtype of an own tensor": on("own/rng", dtype=torch.int32),
    "an own tensor became an own object": on("own/rng", kind="own object"),
    "a new own tensor": add("own/state", Leaf(kind="own", shape=(2,))),
    "a missing own object": drop("own/seed"),
}

ON_ONE_RANK: dict[str, Callable[[Spec], None]] = {
    "a new key there": add("model/new", Leaf(kind="whole", shape=(2,), ranks=frozenset({1}))),
    "a key missing there": on("model/other", ranks=frozenset({0})),
    "a key missing on the coordinator": on("model/other", ranks=frozenset({1})),
    "an object missing there": on("step", ranks=frozenset({0})),
    "shape of its own tensor": on("own/rng", longer_on=1),
}


@pytest.mark.parametrize("what", ON_ALL_RANKS)
def test_a_change_on_all_ranks_is_noticed(what: str) -> None:
    job, other = Job(), changed(ON_ALL_RANKS[what])
    if what.startswith("a name moved"):
        other["model/w"] = replace(other["model/w"], shape=(6,))
    assert job.save(base()) == [PLANNED] * 2
    assert job.save(base(), epoch=1) == [REUSED] * 2
    assert job.wrong(base(), epoch=1) == []
    assert job.save(other, epoch=2) == [PLANNED] * 2
    assert job.wrong(other, epoch=2) == []
    # Both are remembered now.
    assert job.save(base(), epoch=3) == [REUSED] * 2
    assert job.wrong(base(), epoch=3) == []
    assert job.save(other, epoch=4) == [REUSED] * 2
    assert job.wrong(other, epoch=4) == []


@pytest.mark.parametrize("what", ON_ONE_RANK)
def test_a_change_on_one_rank_is_noticed_on_all(what: str) -> None:
    job, other = Job(), changed(ON_ONE_RANK[what])
    assert job.save(base()) == [PLANNED] * 2
    assert without_compare(job.save(other, epoch=1)) == [PLANNED] * 2
    assert job.wrong(other, epoch=1) == []
    assert job.save(other, epoch=2) == [REUSED] * 2
    assert job.wrong(other, epoch=2) == []
    # One rank offers what it offered last time, but then to another plan.
    assert without_compare(job.save(base(), epoch=3)) == [PLANNED] * 2
    assert job.wrong(base(), epoch=3) == []


def without_compare(phases: list[list[str]]) -> list[list[str]]:
    """Ranks that hold different replicated keys compare the values of those that both hold."""
    return [[phase for phase in of_rank if phase != "compare"] for of_rank in phases]


@pytest.mark.parametrize("what", ["coordinator", "to_lowest_rank"])
def test_other_options_are_noticed(what: str) -> None:
    job = Job()
    assert job.save(base()) == [PLANNED] * 2
    options: dict[str, Any] = {"coordinator": 1} if what == "coordinator" else {what: True}
    assert job.save(base(), epoch=1, **options) == [PLANNED] * 2
    assert job.wrong(base(), epoch=1) == []
    assert job.save(base(), epoch=2, **options) == [REUSED] * 2
    assert job.save(base(), epoch=3) == [REUSED] * 2
    assert job.wrong(base(), epoch=3) == []


def test_another_world_size_is_noticed() -> None:
    job = Job()
    replicas: Spec = {
        "bias": Leaf(kind="whole", shape=(5, 3)),
        "step": Leaf(kind="object"),
    }
    assert job.save(replicas) == [PLANNED] * 2
    assert job.save(replicas, epoch=1, world_size=3) == [PLANNED] * 3
    assert job.wrong(replicas, epoch=1, world_size=3) == []
    assert job.save(replicas, epoch=2) == [REUSED] * 2
    assert job.wrong(replicas, epoch=2) == []


def test_ranks_that_changed_places_are_noticed() -> None:
    job = Job()
    assert job.save(base()) == [PLANNED] * 2
    # Rank 0 now brings what rank 1 brought, with the plan that rank 1 had.
    job.memories.reverse()
    mirrored = {
        path: replace(leaf, kind="swapped") if leaf.kind == "rows" else leaf
        for path, leaf in base().items()
    }
    assert job.save(mirrored, epoch=1) == [PLANNED] * 2
    assert job.wrong(mirrored, epoch=1) == []


def test_the_same_values_in_another_memory() -> None:
    """The plan says which local tensor, not where it lies."""
    job = Job()

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*tensor.shape, 2), 98).to(tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0]

    def in_the_middle(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.full((tensor.numel() + 7,), 98).to(tensor.dtype)
        view = room[3 : 3 + tensor.numel()].reshape(tensor.shape)
        return view.copy_(tensor)

    assert job.save(base()) == [PLANNED] * 2
    for epoch, lay in enumerate([torch.clone, strided, in_the_middle, torch.clone], start=1):
        assert job.save(base(), epoch=epoch, lay=lay) == [REUSED] * 2
        assert job.wrong(base(), epoch=epoch) == []


@pytest.mark.parametrize("forgetful", [0, 1, 2])
def test_a_miss_on_one_rank_plans_anew_on_all(forgetful: int) -> None:
    job = Job(world_size=3)
    assert job.save(base()) == [PLANNED] * 3
    assert job.save(base()) == [REUSED] * 3
    job.memory(forgetful).clear()
    assert job.save(base(), epoch=1) == [PLANNED] * 3
    assert job.wrong(base(), epoch=1) == []
    assert job.save(base(), epoch=2) == [REUSED] * 3


def test_a_coordinator_without_the_global_plan_plans_anew() -> None:
    job = Job()
    job.save(base())
    job.memory(0).plans.clear()
    assert job.save(base(), epoch=1) == [PLANNED] * 2
    assert job.wrong(base(), epoch=1) == []


def stages(**more: Leaf) -> Spec:
    """Two pipeline stages with keys of their own, and keys that both have."""
    return {
        "stage0/norm": Leaf(kind="whole", shape=(4,), ranks=frozenset({0})),
        "stage1/norm": Leaf(kind="whole", shape=(3,), ranks=frozenset({1})),
        "embedding": Leaf(kind="whole", shape=(5,)),
        "step": Leaf(kind="object"),
        **more,
    }


def test_pipeline_stages_compare_their_values_by_class() -> None:
    job = Job()
    assert job.save(stages()) == [["agree", "plan", "compare", "write"]] * 2
    for epoch in (1, 2):
        assert job.save(stages(), epoch=epoch) == [REUSED] * 2
        assert job.wrong(stages(), epoch=epoch) == []
    # After another plan, with other keys, nothing that is known of these keys counts.
    more = stages(bias=Leaf(kind="whole", shape=(2,)))
    assert job.save(more, epoch=3) == [["agree", "plan", "compare", "write"]] * 2
    assert job.save(stages(), epoch=4) == [REUSED] * 2
    assert job.save(more, epoch=5) == [REUSED] * 2
    assert job.wrong(more, epoch=5) == []


def test_a_difference_between_pipeline_stages_is_seen_every_time() -> None:
    job = Job()
    apart = stages(seed=Leaf(kind="object", differs=True))
    for epoch in range(3):
        with pytest.warns(ReplicasDifferWarning, match="'seed'"):
            phases = job.save(apart, epoch=epoch)
        assert phases[0][-2:] == ["compare", "write"]
    assert job.save(stages(seed=Leaf(kind="object")), epoch=3) == [REUSED] * 2


FAULTS = [("begin_save", 1), ("write_columns", 0), ("write_columns", 1), ("commit_columns", 0)]


@pytest.mark.parametrize(("method", "rank"), FAULTS)
def test_a_failed_first_save_leaves_no_plan(method: str, rank: int) -> None:
    job = Job()
    fault = CallFault(method=method, error=Boom("injected"), ranks=frozenset({rank}))
    with pytest.raises(CheckpointException, match="injected"):
        job.save(base(), faults=[fault])
    assert [len(memory.ranks) + len(memory.plans) for memory in job.memories] == [0, 0]
    assert job.save(base(), epoch=1) == [PLANNED] * 2
    assert job.wrong(base(), epoch=1) == []


@pytest.mark.parametrize(("method", "rank"), FAULTS)
def test_a_failed_save_does_not_touch_the_plans_that_are_there(method: str, rank: int) -> None:
    job, other = Job(), changed(on("model/w", kind="columns"))
    fault = CallFault(method=method, error=Boom("injected"), ranks=frozenset({rank}))
    job.save(base())
    with pytest.raises(CheckpointException, match="injected"):
        job.save(other, epoch=1, faults=[fault])
    with pytest.raises(CheckpointException, match="injected"):
        job.save(base(), epoch=1, faults=[fault])
    assert job.wrong(base()) == []
    assert job.save(base(), epoch=2) == [REUSED] * 2
    assert job.wrong(base(), epoch=2) == []
    assert job.save(other, epoch=3) == [PLANNED] * 2
    assert job.wrong(other, epoch=3) == []


def test_a_failed_planning_leaves_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job()
    with monkeypatch.context() as patched:
        patched.setattr(agreement, "assignments", _raise)
        with pytest.raises(CheckpointException, match="no assignments"):
            job.save(base())
    assert job.save(base(), epoch=1) == [PLANNED] * 2
    assert job.wrong(base(), epoch=1) == []


def _raise(*arguments: object) -> None:
    raise Boom("no assignments")


def test_it_is_bounded_and_keeps_what_was_used_last() -> None:
    job = Job(capacity=2)
    specs = [{"w": Leaf(kind="rows", shape=(8 + n,))} for n in range(3)]
    assert job.save(specs[0]) == [PLANNED] * 2
    assert job.save(specs[1]) == [PLANNED] * 2
    assert job.save(specs[0]) == [REUSED] * 2
    assert job.save(specs[2]) == [PLANNED] * 2  # specs[1] makes room
    assert [len(memory.ranks) for memory in job.memories] == [2, 2]
    assert [len(memory.plans) for memory in job.memories] == [2, 0]
    assert job.save(specs[0], epoch=1) == [REUSED] * 2
    assert job.save(specs[1], epoch=2) == [PLANNED] * 2
    assert job.wrong(specs[1], epoch=2) == []


def test_what_is_kept_of_a_plan_is_small() -> None:
    """The manifest's section is, the chunks it was made from are not."""
    job = Job()
    job.save(base())
    (kept,) = job.memory(0).plans._entries.values()
    assert len(kept.chunks.tensor) == 0
    assert kept.tensor_section.chunks == int(kept.files.chunks.sum()) > 5
    assert job.save(base(), epoch=1) == [REUSED] * 2
    assert job.wrong(base(), epoch=1) == []


def test_it_belongs_to_the_engine_and_can_be_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    make = agreement.make_global_plan

    def counted(*arguments: Any, **options: Any) -> Any:
        planned.append(1)
        return make(*arguments, **options)

    monkeypatch.setattr(agreement, "make_global_plan", counted)

    def saved(engine: Engine, value: float) -> int:
        before = len(planned)
        writer = FileSystemWriter(tmp_path / "checkpoint")
        engine.save({"w": torch.full((4,), value)}, storage_writer=writer, no_dist=True)
        into = {"w": torch.zeros(4)}
        engine.load(into, storage_reader=FileSystemReader(tmp_path / "checkpoint"), no_dist=True)
        assert into["w"].tolist() == [value] * 4
        return len(planned) - before

    with Engine() as one, Engine() as two:
        assert [saved(one, 1.0), saved(one, 2.0)] == [1, 0]
        assert [saved(two, 3.0), saved(two, 4.0), saved(one, 5.0)] == [1, 0, 0]
        one.clear_plan_cache()
        assert [saved(one, 6.0), saved(one, 7.0), saved(two, 8.0)] == [1, 0, 0]
