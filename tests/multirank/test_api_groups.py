"""Process groups, ``no_dist``, coordinators, engines: who saves and loads together."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import dcp_engine as dcp
from tests.compat import planners, storages
from tests.multirank import states

pytestmark = pytest.mark.multirank


def state(mesh: DeviceMesh, name: str, filled: bool) -> dict[str, Any]:
    whole = states.whole(name, (5, 3))
    return {
        "w": distribute_tensor(whole if filled else torch.zeros(5, 3), mesh, [Shard(0)]),
        "name": name if filled else "",
    }


def loaded(found: dict[str, Any], name: str) -> bool:
    equal = torch.equal(found["w"].full_tensor(), states.whole(name, (5, 3)))
    return equal and found["name"] == name


def two_groups(path: str) -> list[str]:
    """Two halves of the job save different checkpoints at the same time."""
    rank, wrong = dist.get_rank(), []
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = rank % 2
    group, name = halves[mine], ["even", "odd"][mine]
    mesh = DeviceMesh.from_group(group, "cpu")
    for turn in range(3):
        if turn == 1 and mine:  # one group is ahead of the other by a save
            writer = dcp.FileSystemWriter(f"{path}/more")
            dcp.save(state(mesh, name, True), storage_writer=writer, process_group=group)
        dcp.save(
            state(mesh, name, True),
            storage_writer=dcp.FileSystemWriter(f"{path}/{name}"),
            process_group=group,
            coordinator_rank=mine,
            timeout=60,
        )
        found = state(mesh, name, False)
        reader = dcp.FileSystemReader(f"{path}/{name}")
        dcp.load(found, storage_reader=reader, process_group=group, coordinator_rank=1)
        if not loaded(found, name):
            wrong.append(f"turn {turn}")
    line, _ = states.meshes(4)
    for other in ("even", "odd"):  # and all together read both
        found = state(line, other, False)
        dcp.load(found, storage_reader=dcp.FileSystemReader(f"{path}/{other}"))
        if not loaded(found, other):
            wrong.append(other)
    if dcp.default_engine(group) is dcp.default_engine():
        wrong.append("groups share an engine")
    try:
        dcp.save({}, storage_writer=dcp.FileSystemWriter(path), process_group=halves[1 - mine])
    except dcp.UsageError as error:
        if "not in the process group" not in str(error):
            wrong.append(str(error))
    else:
        wrong.append("a rank saved over a group that it is not in")
    return wrong


def test_two_groups_at_the_same_time(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(4, two_groups, str(tmp_path)) == [[]] * 4
    assert len(list((tmp_path / "even").iterdir())) == 2


def mesh_outside(path: str) -> list[Any]:
    """A tensor on all four ranks, saved over two of them."""
    pair = dist.new_group([0, 1])
    line, _ = states.meshes(4)
    value = state(line, "x", True)
    if dist.get_rank() > 1:
        return []
    try:
        writer = dcp.FileSystemWriter(path)
        dcp.save(value, storage_writer=writer, process_group=pair, timeout=60)
    except dcp.CheckpointException as error:
        return [error.kind, error.tensor, sorted(error.failures), "2, 3" in str(error)]
    return ["saved"]


def test_a_mesh_that_reaches_outside_is_refused_by_name(ranks: Any, tmp_path: Path) -> None:
    found = ranks.run(4, mesh_outside, str(tmp_path / "c"))
    # Both find it, each by itself; one that is late by more than the grace is not named.
    assert found[0] == found[1]
    kind, tensor, named, right = found[0]
    assert (kind, tensor, right) == ("unsupported_state", "w", True)
    assert named in ([0], [1], [0, 1])
    assert found[2:] == [[], []]


def alone(path: str) -> list[str]:
    """Every rank for itself, in a job that is initialised."""
    rank, wrong = dist.get_rank(), []
    mine = f"{path}/{rank}"
    for planner in (None, planners.FP16Planner()):
        for _ in range(rank + 1):  # another number of saves on each rank: nobody waits
            dcp.save(
                {"w": torch.full((3,), float(rank)), "rank": rank},
                storage_writer=dcp.FileSystemWriter(mine),
                planner=planner,
                no_dist=True,
            )
        found: dict[str, Any] = {"w": torch.zeros(3), "rank": None}
        loader = planners.CastingLoadPlanner() if planner else None
        reader = dcp.FileSystemReader(mine)
        dcp.load(found, storage_reader=reader, planner=loader, no_dist=True)
        if found["rank"] != rank or found["w"].tolist() != [rank] * 3:
            wrong.append(f"{found}")
    line, _ = states.meshes(2)
    try:
        writer = dcp.FileSystemWriter(mine)
        dcp.save(state(line, "x", True), storage_writer=writer, no_dist=True)
    except dcp.CheckpointException as error:
        if (error.kind, error.tensor) != ("plan_gap", "w"):
            wrong.append(str(error))
    else:
        wrong.append("half a tensor was saved")
    dcp.save(state(line, "x", True), storage_writer=dcp.FileSystemWriter(f"{path}/both"))
    found = state(line, "x", False)
    if rank == 1:  # a rank may load its part alone
        dcp.load(found, storage_reader=dcp.FileSystemReader(f"{path}/both"), no_dist=True)
        local = found["w"].to_local()
        if not torch.equal(local, states.whole("x", (5, 3))[3:]):
            wrong.append(f"{local}")
    return wrong


def test_no_dist_in_an_initialised_job(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, alone, str(tmp_path)) == [[], []]


def other_coordinators(path: str) -> list[str]:
    line, _ = states.meshes(4)
    rank, wrong = dist.get_rank(), []
    for coordinator in (3, 0, 2):
        for planner in (None, planners.RenameSavePlanner()):
            dcp.save(
                state(line, "x", True),
                storage_writer=dcp.FileSystemWriter(path),
                planner=planner,
                coordinator_rank=coordinator,
                extra_files={"who": str(rank)},
                user_metadata={"who": rank},
                timeout=60,
            )
            if dcp.read_extra(path, "who") != str(coordinator).encode():
                wrong.append(f"coordinator {coordinator}")
            found = state(line, "x", False)
            loader = planners.RenameLoadPlanner() if planner else None
            reader = dcp.FileSystemReader(path)
            dcp.load(found, storage_reader=reader, planner=loader, coordinator_rank=3 - coordinator)
            if not loaded(found, "x"):
                wrong.append(f"loaded {coordinator}")
            dist.barrier()
    try:
        dcp.save({}, storage_writer=dcp.FileSystemWriter(path), coordinator_rank=4)
    except dcp.UsageError as error:
        if "coordinator_rank" not in str(error):
            wrong.append(str(error))
    return wrong


def test_any_rank_can_coordinate(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(4, other_coordinators, str(tmp_path / "c")) == [[]] * 4


def engines(path: str) -> list[str]:
    """Several engines over one group, in turns; closed ones; and a group that comes again."""
    line, _ = states.meshes(2)
    wrong = []
    with dcp.Engine(timeout=60) as one, dcp.Engine(dist.group.WORLD, timeout=60) as two:
        for engine in (one, two, one):
            writer = dcp.FileSystemWriter(path)
            metadata = engine.save(state(line, "x", True), storage_writer=writer)
            if metadata.state_dict_metadata["w"].size != (5, 3):  # type: ignore[union-attr]
                wrong.append("metadata")
            found = state(line, "x", False)
            engine.load(found, storage_reader=dcp.FileSystemReader(path))
            if not loaded(found, "x"):
                wrong.append("loaded")
    try:
        one.save({}, storage_writer=dcp.FileSystemWriter(path))
    except dcp.UsageError as error:
        if "closed" not in str(error):
            wrong.append(str(error))
    else:
        wrong.append("a closed engine saved")
    return wrong


def test_engines(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, engines, str(tmp_path / "c")) == [[], []]


def group_comes_again(path: str) -> list[str]:
    """The default group destroyed and made again: the default engine follows."""
    wrong = []
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    before = dcp.default_engine()
    dcp.save({"x": 1}, storage_writer=dcp.FileSystemWriter(path), timeout=60)
    dist.destroy_process_group()
    dcp.save({"x": rank}, storage_writer=dcp.FileSystemWriter(f"{path}-{rank}"))
    again: Any = dist.PrefixStore("again", store)
    dist.init_process_group("gloo", store=again, rank=rank, world_size=2)
    after = dcp.default_engine()
    if after is before or not before.closed:
        wrong.append("the engine of a group that is gone was kept")
    dcp.save({"x": 2}, storage_writer=dcp.FileSystemWriter(path), timeout=60)
    found: dict[str, Any] = {"x": 0}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), timeout=60)
    if found["x"] != 2:
        wrong.append(f"{found}")
    if dcp.default_engine() is not after or dcp.default_engine(dist.group.WORLD) is not after:
        wrong.append("the default engine changes")
    return wrong


def test_a_default_group_made_again(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, group_comes_again, str(tmp_path / "c")) == [[], []]


def other_calls(path: str) -> list[str]:
    """Ranks that are not doing the same thing are told, both."""
    rank = dist.get_rank()
    try:
        if rank == 0:
            dcp.save({"x": 1}, storage_writer=dcp.FileSystemWriter(path), timeout=30)
        else:
            dcp.load({"x": 1}, storage_reader=dcp.FileSystemReader(path), timeout=30)
    except dcp.CheckpointException as error:
        return [error.kind]
    return []


def test_ranks_in_different_operations(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, other_calls, str(tmp_path / "c")) == [["out_of_step"]] * 2
    assert not (tmp_path / "c" / "manifest.json").exists()


def backend_without_data(path: str) -> list[str]:
    """A group that can carry no data at all: the store is enough."""
    rank = dist.get_rank()
    metadata = dcp.save(
        {"x": torch.arange(4.0), "own": dcp.PerRank(rank)},
        storage_writer=dcp.FileSystemWriter(path),
        timeout=60,
    )
    found: dict[str, Any] = {"x": torch.zeros(4), "own": dcp.PerRank(None)}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), timeout=60)
    wrong = [] if found["own"].value == rank else [f"{found['own']}"]
    return wrong + ([] if "x" in metadata.state_dict_metadata else ["metadata"])


def test_a_group_that_carries_no_data(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, backend_without_data, str(tmp_path / "c"), backend="fake") == [[], []]


def metadata_everywhere(path: str) -> list[Any]:
    import pickle

    line, _ = init_device_mesh("cpu", (2,)), None
    metadata = dcp.save(state(line, "x", True), storage_writer=dcp.FileSystemWriter(path))
    plain = pickle.loads(pickle.dumps(metadata))
    dist.barrier()
    again = state(line, "x", True)  # torch 2.6 has warnings for whoever makes a DTensor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = dcp.save(again, storage_writer=storages.FileWriter(path + "2"))
    entry = plain.state_dict_metadata["w"]
    return [
        type(plain) is dcp.Metadata,
        [list(c.offsets) for c in entry.chunks],
        type(other) is dcp.Metadata,
        len(other.storage_data),
        os.path.basename(str(other.storage_meta.checkpoint_id)),  # type: ignore[union-attr]
    ]


def test_metadata_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    expected = [True, [[0, 0], [3, 0]], True, 3, "c2"]
    assert ranks.run(2, metadata_everywhere, str(tmp_path / "c")) == [expected] * 2
