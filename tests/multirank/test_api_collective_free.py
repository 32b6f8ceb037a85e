"""``use_collectives=False``: every rank for itself, and one checkpoint in the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import dcp_engine as dcp
from tests.compat import planners, storages
from tests.multirank import states

pytestmark = pytest.mark.multirank

TOKENS = ["0" * 31 + str(i) for i in range(4)]


def save(path: str, value: dict[str, Any], token: str | None = TOKENS[0], **options: Any) -> Any:
    writer = options.pop("storage_writer", None) or dcp.FileSystemWriter(path)
    return dcp.save(
        value, storage_writer=writer, use_collectives=False, save_id=token, timeout=60, **options
    )


def load(path: str, into: dict[str, Any], **options: Any) -> dcp.LoadReport:
    return dcp.load(into, storage_reader=dcp.FileSystemReader(path), timeout=60, **options)


def kind_of(call: Any, *args: Any, **options: Any) -> tuple[str, str]:
    try:
        call(*args, **options)
    except dcp.CheckpointError as error:
        return error.kind, str(error)
    return "", ""


def save_state(path: str) -> None:
    save(path, states.state(dist.get_world_size(), filled=True))


def load_state(path: str, turned: bool, own: bool) -> list[str]:
    world_size = dist.get_world_size()
    found = states.state(world_size, filled=False, turned=turned, own=own)
    load(path, found)
    return states.differences(found, world_size, own=own)


@pytest.mark.parametrize("world_size", [2, 4])
def test_round_trip_and_reshard(ranks: Any, tmp_path: Path, world_size: int) -> None:
    path = str(tmp_path / "c")
    ranks.run(world_size, save_state, path)
    assert sorted(os.listdir(path)) == [
        f"data-{TOKENS[0]}",
        *(f"manifest-rank{rank:05}.json" for rank in range(world_size)),
    ]
    assert dcp.verify(path).world_size == world_size  # ranks wrote the same values
    assert ranks.run(world_size, load_state, path, False, True) == [[]] * world_size
    other = 6 - world_size
    assert ranks.run(other, load_state, path, True, False) == [[]] * other


def tokens(path: str) -> list[str]:
    """What the ranks need to share, and what a second save may not do."""
    wrong, rank = [], dist.get_rank()
    value = {"x": torch.arange(3), "rank": dcp.PerRank(rank)}
    kind, text = kind_of(save, f"{path}/none", value, None)
    if kind != "usage" or "save_id" not in text:
        wrong.append(f"no token: {kind} {text}")
    os.environ["TORCHELASTIC_RUN_ID"] = "the-run"
    try:
        save(f"{path}/run", value, None)
        save(f"{path}/run2", value, None)
    finally:
        del os.environ["TORCHELASTIC_RUN_ID"]
    save(f"{path}/twice", value)
    dist.barrier()
    found: dict[str, Any] = {"x": torch.zeros(3, dtype=torch.int64), "rank": dcp.PerRank(None)}
    load(f"{path}/run", found)
    if found["rank"].value != rank or found["x"].tolist() != [0, 1, 2]:
        wrong.append(f"{found}")
    for token in TOKENS[:2]:
        kind, text = kind_of(save, f"{path}/twice", value, token)
        if kind != "conflict":
            wrong.append(f"second save: {kind} {text}")
    load(f"{path}/twice", found)
    dist.barrier()
    return wrong


def test_tokens(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, tokens, str(tmp_path)) == [[], []]
    ids = [
        json.loads((tmp_path / name / "manifest-rank00001.json").read_text())["save_id"]
        for name in ("run", "run2")
    ]
    assert ids[0] != ids[1]
    assert not (tmp_path / "none").exists()


def only_some(path: str, savers: list[int]) -> list[tuple[str, str]]:
    value = {"x": torch.arange(3)}
    if dist.get_rank() in savers:
        save(path, value)
    dist.barrier()
    return [kind_of(load, path, {"x": torch.zeros(3, dtype=torch.int64)})]


def test_ranks_that_did_not_save_are_named(ranks: Any, tmp_path: Path) -> None:
    for results in ranks.run(4, only_some, str(tmp_path / "c"), [0, 2]):
        kind, text = results[0]
        assert kind == "incomplete"
        assert "ranks 1, 3 of 4" in text


def other_tokens(path: str) -> list[tuple[str, str]]:
    save(path, {"x": torch.arange(3)}, TOKENS[dist.get_rank()])
    dist.barrier()
    return [kind_of(load, path, {"x": torch.zeros(3, dtype=torch.int64)})]


def test_ranks_with_another_token_are_named(ranks: Any, tmp_path: Path) -> None:
    for results in ranks.run(2, other_tokens, str(tmp_path / "c")):
        kind, text = results[0]
        assert kind == "incomplete"
        assert "ranks 1 carry another token" in text


def uneven(path: str) -> list[str]:
    """Keys that only some ranks have, and tensors on slices of a mesh."""
    rank, wrong = dist.get_rank(), []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = states.whole("w", (6, 5))
    value: dict[str, Any] = {
        "on_tp": distribute_tensor(whole, mesh["tp"], [Shard(1)]),
        "on_dp": distribute_tensor(whole, mesh["dp"], [Shard(0)]),
        "copies": distribute_tensor(whole, mesh, [Replicate(), Replicate()]),
        "copied_slice": distribute_tensor(whole, mesh["tp"], [Replicate()]),
        "objects": {"all": "same", "differs": rank},
    }
    if rank == 1:
        value["object_of_one"] = ["only", "rank 1"]
        value["big_object_of_one"] = "x" * 10_000
        value["tensor_of_one"] = torch.arange(4.0)
    save(path, value)
    dist.barrier()
    line = init_device_mesh("cpu", (4,))
    found: dict[str, Any] = {
        name: distribute_tensor(torch.zeros(6, 5), line, [Shard(0)])
        for name in ("on_tp", "on_dp", "copies", "copied_slice")
    }
    found |= {"objects": {"all": None, "differs": None}}
    found |= {"object_of_one": None, "big_object_of_one": None}
    load(path, found)
    for name in ("on_tp", "on_dp", "copies", "copied_slice"):
        if not torch.equal(found[name].full_tensor(), whole):
            wrong.append(f"{name} {found[name].full_tensor()}")
    if found["objects"] != {"all": "same", "differs": 0}:
        wrong.append(f"{found['objects']}")
    if found["object_of_one"] != ["only", "rank 1"] or found["big_object_of_one"] != "x" * 10_000:
        wrong.append("objects of rank 1")
    kind, text = kind_of(load, path, {"tensor_of_one": torch.zeros(4)})
    if (
        kind != "manifest_invalid"
        or "'tensor_of_one'" not in text
        or "none of them wrote" not in text
    ):
        wrong.append(f"{kind} {text}")
    return wrong


def test_what_only_some_ranks_have(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(4, uneven, str(tmp_path / "c")) == [[]] * 4


def missing_part(path: str) -> tuple[str, str]:
    """Rank 1 holds a shard and does not save it."""
    whole = states.whole("w", (4, 2))
    line = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(whole, line, [Shard(0)])
    save(path, {"w": sharded} if dist.get_rank() == 0 else {})
    dist.barrier()
    return kind_of(load, path, {"w": torch.zeros(4, 2)})


def test_a_shard_that_nobody_wrote_is_named(ranks: Any, tmp_path: Path) -> None:
    for kind, text in ranks.run(2, missing_part, str(tmp_path / "c")):
        assert kind == "manifest_invalid"
        assert "'w'" in text
        assert "cover 4 of 8" in text


def other_kinds(path: str) -> tuple[str, str]:
    rank = dist.get_rank()
    save(path, {"v": torch.ones(2) if rank else "text", "w": torch.ones(2 + rank)})
    dist.barrier()
    return kind_of(load, path, {"v": torch.ones(2)})


def test_ranks_that_disagree_are_refused_at_load(ranks: Any, tmp_path: Path) -> None:
    for kind, text in ranks.run(2, other_kinds, str(tmp_path / "c")):
        assert kind == "manifest_invalid"
        assert "'v'" in text


def items(path: str) -> list[str]:
    """A planner and a storage of other origin without collectives."""
    rank, wrong = dist.get_rank(), []
    value = {"x": torch.arange(5.0), "o": ("same", 1)}
    save(f"{path}/planner", value, planner=planners.FP16Planner())
    dist.barrier()
    found: dict[str, Any] = {"x": torch.zeros(5).half(), "o": None}
    load(f"{path}/planner", found)
    if found["x"].tolist() != [0, 1, 2, 3, 4] or found["o"] != ("same", 1):
        wrong.append(f"{found}")
    kind, text = kind_of(
        save, f"{path}/planner", {"other": 1}, TOKENS[1], planner=planners.FP16Planner()
    )
    if kind != "conflict":
        wrong.append(f"{kind} {text}")
    writer = storages.FileWriter(f"{path}/files{rank}")
    save("", value, storage_writer=writer)
    if (writer.rank, writer.use_collectives, writer.is_coordinator) != (rank, False, rank == 0):
        wrong.append(f"{writer.__dict__}")
    found = {"x": torch.zeros(5), "o": None}
    reader = storages.FileReader(f"{path}/files{rank}")
    dcp.load(found, storage_reader=reader, no_dist=True)
    if found["x"].tolist() != [0, 1, 2, 3, 4]:
        wrong.append(f"{found}")
    return wrong


def rank_local(path: str) -> list[str]:
    """A storage that keeps metadata by rank, as torch's own does without collectives."""
    rank, wrong = dist.get_rank(), []
    value = {"x": torch.full((3,), float(rank)), "o": f"rank {rank}"}
    save("", value, storage_writer=storages.RankLocalWriter(path))
    dist.barrier()
    found: dict[str, Any] = {"x": torch.zeros(3), "o": None}
    reader = storages.RankLocalReader(path)
    dcp.load(found, storage_reader=reader, timeout=60)
    if found["x"].tolist() != [rank] * 3 or found["o"] != f"rank {rank}":
        wrong.append(f"{found}")
    if (reader.rank, reader.use_collectives) != (rank, False):
        wrong.append(f"{reader.__dict__}")
    dist.barrier()
    if rank == 1:
        Path(path, ".metadata1").unlink()
    kind, text = kind_of(dcp.load, found, storage_reader=storages.RankLocalReader(path))
    if kind != "rank_failed" or "rank 1" not in text or ".metadata1" not in text:
        wrong.append(f"{kind} {text}")
    return wrong


def test_metadata_by_rank(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, rank_local, str(tmp_path / "c")) == [[], []]


def test_items_without_collectives(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, items, str(tmp_path)) == [[], []]


def one_fails(path: str) -> list[Any]:
    """A rank that fails fails alone: nobody was asked to wait for it."""
    rank = dist.get_rank()
    bad = torch.empty(2, device="meta") if rank == 1 else torch.ones(2)
    kind, text = kind_of(save, path, {"x": bad})
    dist.barrier()
    left = sorted(os.listdir(path))
    dist.barrier()
    return [kind, "rank 1" in text, left]


def test_a_rank_fails_alone(ranks: Any, tmp_path: Path) -> None:
    first, second = ranks.run(2, one_fails, str(tmp_path))
    assert first[:1] == [""]
    assert second[:2] == ["unsupported_state", True]
    assert first[2] == second[2] == [f"data-{TOKENS[0]}", "manifest-rank00000.json"]


def ragged(path: str) -> tuple[str, str]:
    line = init_device_mesh("cpu", (2,))
    local = torch.ones(3 if dist.get_rank() else 1, 2)
    tensor = DTensor.from_local(
        local, line, [Shard(0)], run_check=False, shape=torch.Size([4, 2]), stride=(2, 1)
    )
    return kind_of(save, path, {"w": tensor})


def test_ragged_shards_are_refused_at_save(ranks: Any, tmp_path: Path) -> None:
    for kind, text in ranks.run(2, ragged, str(tmp_path / "c")):
        assert kind == "unsupported_state"
        assert "'w'" in text
