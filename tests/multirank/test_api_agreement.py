"""What one rank holds and another does not: refused, warned of, or each rank's own."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

import dcp_engine as dcp
from tests.compat import planners, storages

pytestmark = pytest.mark.multirank

BIG = 300_000
"""float32 elements: more than 1 MiB."""


class Unruly:
    """A Stateful whose methods fail on one rank."""

    def __init__(self, method: str, rank: int) -> None:
        self.failing = method if dist.get_rank() == rank else ""

    def state_dict(self) -> dict[str, Any]:
        if self.failing == "state_dict":
            raise ValueError("state_dict failed")
        return {"x": torch.zeros(2)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.failing == "load_state_dict":
            raise ValueError("load_state_dict failed")


def told(call: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """What became of a save or load on this rank."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result: dict[str, Any] = {"kind": None, "failures": [], "text": "", "tensor": None}
        try:
            call(*args, timeout=60, **options)
        except dcp.CheckpointException as error:
            result = {
                "kind": error.kind,
                "failures": sorted(error.failures),
                "text": str(error),
                "tensor": error.tensor,
                "rank": error.rank,
            }
    ours = [w for w in caught if issubclass(w.category, dcp.ReplicasDifferWarning)]
    return {**result, "warnings": [str(w.message) for w in ours]}


def bad_value(name: str) -> Any:
    """On every rank, a value of this kind where it is made by all ranks together."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    if name == "partial":
        return DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    if name == "ragged":
        local = torch.ones(3 if rank == 1 else 1, 2)
        shape, stride = torch.Size([world, 2]), (2, 1)
        return DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
    if rank != 1:
        return "text" if name == "object" else torch.ones(2)
    if name == "meta":
        return torch.empty(2, device="meta")
    if name == "sparse":
        return torch.ones(2).to_sparse()
    if name == "object":
        return threading.Lock()
    return {("a", "tuple"): 1}


BAD = ["meta", "sparse", "object", "key", "partial", "ragged"]


def refuse_all(path: str) -> dict[str, dict[str, Any]]:
    results = {}
    for name in BAD:
        for way in ("columns", "items", "foreign"):
            writer: Any = dcp.FileSystemWriter(f"{path}/{name}-{way}")
            if way == "foreign":
                writer = storages.FileWriter(f"{path}/{name}-{way}")
            planner = planners.SaveExtraDataPlanner() if way == "items" else None
            state = {"fine": torch.ones(1), "deep": [torch.ones(1), {"bad": bad_value(name)}]}
            results[f"{name}-{way}"] = told(dcp.save, state, storage_writer=writer, planner=planner)
    return results


def test_a_bad_value_of_one_rank_is_refused_on_all(ranks: Any, tmp_path: Path) -> None:
    for results in ranks.run(2, refuse_all, str(tmp_path)):
        for name, result in results.items():
            # Partial is wrong everywhere, and a rank that fails stops the others.
            bad = {0, 1} if name.startswith("partial") else {1}
            assert result["kind"] == "unsupported_state", (name, result)
            assert result["failures"], (name, result)
            assert set(result["failures"]) <= bad, (name, result)
            assert "deep.1.bad" in result["text"], (name, result)
            assert f"rank {result['failures'][0]}" in result["text"], (name, result)
    assert not list(tmp_path.rglob("manifest.json"))
    assert not list(tmp_path.rglob(".metadata"))


def diverge(path: str, what: str, way: str) -> dict[str, Any]:
    rank = dist.get_rank()
    mine: dict[str, Any] = {
        "shape": torch.ones(2 + rank % 2),
        "dtype": torch.ones(2, dtype=torch.float64 if rank % 2 else torch.float32),
        "type": torch.ones(2) if rank % 2 else "text",
    }
    writer: Any = (storages.FileWriter if way == "foreign" else dcp.FileSystemWriter)(path)
    planner = planners.DDPLoadBalancingPlanner() if way == "items" else None
    return told(dcp.save, {"v": mine[what]}, storage_writer=writer, planner=planner)


@pytest.mark.parametrize("what", ["shape", "dtype", "type"])
def test_divergence_is_refused_with_the_ranks_named(ranks: Any, tmp_path: Path, what: str) -> None:
    for way in ("columns", "foreign"):
        for result in ranks.run(4, diverge, str(tmp_path / f"{what}{way}"), what, way):
            assert result["kind"] == "plan_divergence", result
            assert result["tensor"] == "v"
            if way == "columns":
                assert "ranks 0, 2" in result["text"] or "ranks [0, 2]" in result["text"], result
                assert "ranks 1, 3" in result["text"] or "ranks [1, 3]" in result["text"], result
            else:
                assert "rank 0" in result["text"] and "rank 1" in result["text"], result
    assert not list(tmp_path.rglob("manifest.json"))


def other_values(path: str, way: str) -> dict[str, dict[str, Any]]:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def replica(tensor: torch.Tensor) -> DTensor:
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)

    states: dict[str, dict[str, Any]] = {
        "same": {"a": torch.ones(3), "o": [1], "r": replica(torch.ones(2))},
        "object": {"a": torch.ones(3), "o": ["x", rank // 3]},
        "tensor": {"a": torch.full((3,), float(rank // 3)), "o": 1},
        "dtensor": {"a": replica(torch.full((3,), float(rank // 3)))},
        "large": {"a": torch.full((BIG,), float(rank // 3))},
        "own": {"a": dcp.PerRank(torch.full((3,), float(rank))), "o": dcp.PerRank(rank)},
    }
    if way != "columns":
        del states["own"]
    results = {}
    for name, state in states.items():
        for strict in (False, True):
            place = f"{path}/{name}-{strict}"
            writer: Any = (storages.FileWriter if way == "foreign" else dcp.FileSystemWriter)(place)
            planner: Any = None
            if way == "items":
                planner = planners.SaveExtraDataPlanner(strict_replicas=strict)
            options = {"strict_replicas": strict} if way != "items" else {}
            results[f"{name}-{strict}"] = told(
                dcp.save, state, storage_writer=writer, planner=planner, **options
            )
    return results


@pytest.mark.parametrize("way", ["columns", "items", "foreign"])
def test_other_values_are_told_or_refused(ranks: Any, tmp_path: Path, way: str) -> None:
    for results in ranks.run(4, other_values, str(tmp_path), way):
        for name, result in results.items():
            what, strict = name.split("-")
            differs = what in ("object", "tensor", "dtensor") or (what, strict) == ("large", "True")
            key = "o" if what == "object" else "a"
            if strict == "True" and differs:
                found = (result["kind"], result["tensor"])
                assert found == ("replicas_differ", key), (name, result)
                texts = [result["text"]]
            else:
                assert result["kind"] is None, (name, result)
                texts = result["warnings"]
            assert bool(texts) == differs, (name, result)
            for text in texts:
                assert f"'{key}'" in text, (name, text)
                assert "rank 3" in text, (name, text)
    committed = [p.parent.name for p in tmp_path.rglob("manifest.json")]
    committed += [p.parent.name for p in tmp_path.rglob(".metadata")]
    assert "large-True" not in committed
    assert {"tensor-False", "large-False", "same-True"} <= set(committed)


def per_rank_state(filled: bool) -> dict[str, Any]:
    rank = dist.get_rank()
    return {
        "rng": dcp.PerRank(torch.full((3,), rank if filled else -1)),
        "data": dcp.PerRank(
            {"seen": rank * 10 if filled else None, "list": [torch.full((1 + rank,), float(rank))]}
        ),
        "deep": {"state": dcp.PerRank(f"rank {rank}" if filled else ""), "all": 7 if filled else 0},
        "w": torch.ones(2) if filled else torch.zeros(2),
    }


def save_per_rank(path: str) -> None:
    writer = dcp.FileSystemWriter(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcp.save(per_rank_state(True), storage_writer=writer, timeout=60)


def load_per_rank(path: str, policy: str) -> dict[str, Any]:
    state = per_rank_state(False)
    reader = dcp.FileSystemReader(path)
    result = told(dcp.load, state, storage_reader=reader, per_rank=policy)
    own = state["data"].value
    return {
        **result,
        "rng": state["rng"].value,
        "seen": own["seen"],
        "list": own["list"][0],
        "state": state["deep"]["state"].value,
        "all": state["deep"]["all"],
        "w": state["w"].tolist(),
    }


def test_per_rank_values_come_back_to_their_ranks(ranks: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    ranks.run(2, save_per_rank, path)
    for policy in ("error", "skip"):
        for rank, result in enumerate(ranks.run(2, load_per_rank, path, policy)):
            assert result["kind"] is None, result["text"]
            assert result["rng"].tolist() == [rank] * 3
            assert (result["seen"], result["state"]) == (10 * rank, f"rank {rank}")
            assert result["list"].tolist() == [rank] * (1 + rank)
            assert (result["all"], result["w"]) == (7, [1, 1])
    for world_size in (1, 4):
        for result in ranks.run(world_size, load_per_rank, path, "error"):
            assert result["kind"] == "world_size_mismatch"
            assert result["tensor"] in ("rng", "data.seen", "data.list.0", "deep.state")
            assert result["w"] == [0, 0]
        for rank, result in enumerate(ranks.run(world_size, load_per_rank, path, "skip")):
            assert result["kind"] is None, result["text"]
            assert result["rng"].tolist() == [-1] * 3
            assert (result["seen"], result["state"]) == (None, "")
            assert result["list"].tolist() == [rank] * (1 + rank)
            assert (result["all"], result["w"]) == (7, [1, 1])
        for result in ranks.run(world_size, load_per_rank, path, "list"):
            assert result["kind"] is None, result["text"]
            assert [t.tolist() for t in result["rng"]] == [[0] * 3, [1] * 3]
            assert (result["seen"], result["state"]) == ([0, 10], ["rank 0", "rank 1"])
            assert [t.tolist() for t in result["list"]] == [[0], [1, 1]]
            assert (result["all"], result["w"]) == (7, [1, 1])


def stateful_fails(path: str) -> list[dict[str, Any]]:
    """A Stateful that fails on rank 1: in a save, before a load, after a load."""
    writer = dcp.FileSystemWriter(path)
    dcp.save({"s": {"x": torch.ones(2)}}, storage_writer=writer, timeout=60)
    results = [
        told(dcp.save, {"s": Unruly("state_dict", 1)}, storage_writer=dcp.FileSystemWriter(path))
    ]
    for planner in (None, planners.ExtraDataLoadPlanner()):
        for method in ("state_dict", "load_state_dict"):
            reader = dcp.FileSystemReader(path)
            results.append(
                told(dcp.load, {"s": Unruly(method, 1)}, storage_reader=reader, planner=planner)
            )
    found = {"s": {"x": torch.zeros(2)}}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), timeout=60)
    return [*results, {"x": found["s"]["x"].tolist()}]


def test_a_stateful_that_fails_on_one_rank_fails_all(ranks: Any, tmp_path: Path) -> None:
    for *failed, loaded in ranks.run(2, stateful_fails, str(tmp_path / "c")):
        assert len(failed) == 5
        for result in failed:
            assert result["failures"] == [1], result
            assert "state_dict failed" in result["text"]
        assert loaded == {"x": [1, 1]}


def different_keys(path: str) -> tuple[list[str], dict[str, Any]]:
    """A key that only rank 1 has is stored all the same."""
    rank = dist.get_rank()
    state: dict[str, Any] = {"both": torch.ones(2)}
    if rank == 1:
        state |= {"tensor": torch.arange(3.0), "object": ["o"]}
    metadata = dcp.save(state, storage_writer=dcp.FileSystemWriter(path), timeout=60)
    found: dict[str, Any] = {"tensor": torch.zeros(3), "object": None} if rank == 0 else {}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), timeout=60)
    return sorted(metadata.state_dict_metadata), found


def test_keys_of_one_rank_are_stored(ranks: Any, tmp_path: Path) -> None:
    first, second = ranks.run(2, different_keys, str(tmp_path / "c"))
    assert first[0] == second[0] == ["both", "object", "tensor"]
    assert first[1]["object"] == ["o"]
    assert first[1]["tensor"].tolist() == [0, 1, 2]
