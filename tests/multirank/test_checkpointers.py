"""Checkpointers on real ranks, with real children."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import dcp_engine as dcp
from dcp_engine.checkpointer import (
    AsyncCheckpointer,
    BarrierConfig,
    CheckpointerConfig,
    CheckpointProcessConfig,
    CheckpointReader,
    CheckpointWriterConfig,
    DistBarrier,
    RankInfo,
    make_async_checkpointer,
    make_sync_checkpointer,
)
from dcp_engine.errors import CheckpointException
from tests.checkpointer import children
from tests.checkpointer.test_barriers import tcp_args
from tests.multirank import states
from tests.ports import free_port

pytestmark = pytest.mark.multirank

CONFIG = CheckpointerConfig(
    writer_config=CheckpointWriterConfig(write_barrier_timeout_secs=40, stall_timeout_secs=30),
    process_config=CheckpointProcessConfig(subprocess_init_timeout_secs=60),
)


KEYS = set(states.SHARDED) - {"part_mesh"}


def here() -> RankInfo:
    return RankInfo(dist.get_rank(), dist.get_world_size())


def state(*, filled: bool, turned: bool = False) -> dict[str, Any]:
    """Sharded, replicated, and each rank's own."""
    world_size = dist.get_world_size()
    own = torch.full((3,), float(dist.get_rank())) if filled else torch.zeros(3)
    return {
        "sharded": states.sharded(world_size, filled=filled, turned=turned),
        "same": {"bias": torch.arange(4.0) if filled else torch.zeros(4), "step": 9 * filled},
        "own": own,
        "name": f"rank {dist.get_rank()}" if filled else "",
    }


def wrong(found: dict[str, Any], *, own: bool = True) -> list[str]:
    """Names of what is not as it was saved."""
    result = [
        name
        for name, tensor in found["sharded"].items()
        if not torch.equal(tensor.full_tensor(), states.whole(name, *states.SHARDED[name]))
    ]
    if found["same"]["bias"].tolist() != [0.0, 1.0, 2.0, 3.0] or found["same"]["step"] != 9:
        result.append(f"same {found['same']}")
    if own:
        rank = dist.get_rank()
        if found["own"].tolist() != [float(rank)] * 3 or found["name"] != f"rank {rank}":
            result.append(f"own {found['own']} {found['name']}")
    return result


def failure_of(call: Any) -> dict[str, Any]:
    """What a call raised, in words."""
    try:
        call()
    except BaseException as error:
        failures = error.failures if isinstance(error, CheckpointException) else {}
        return {
            "type": type(error).__name__,
            "kind": getattr(error, "kind", None),
            "ranks": sorted(failures),
            "text": str(error),
        }
    return {"type": None}


def save_both_ways(path: str) -> list[list[str]]:
    """A sync and an async save, each read back by its layer, resharded too."""
    outcomes = []
    with make_sync_checkpointer(CONFIG) as checkpointer:
        checkpointer.save(f"{path}/sync", state(filled=True))
        into = state(filled=False, turned=True)
        outcomes.append(wrong(checkpointer.load(f"{path}/sync", into, strict=True)))
    with make_async_checkpointer(CONFIG) as checkpointer:
        saved = state(filled=True)
        staged, written = checkpointer.save(f"{path}/async", saved)
        staged.result()
        saved["same"]["bias"].zero_()
        saved["own"].fill_(-1)
        written.result()
        into = state(filled=False, turned=True)
        outcomes.append(wrong(checkpointer.load(f"{path}/async", into)))
        into = state(filled=False)
        dcp.load(into, checkpoint_id=f"{path}/async", timeout=60)
        outcomes.append(wrong(into))
        replicated = distribute_tensor(
            torch.zeros(13, 6), init_device_mesh("cpu", (dist.get_world_size(),)), [Replicate()]
        )
        checkpointer.load(f"{path}/sync", {"sharded": {"rows": replicated}})
        rows = states.whole("rows", *states.SHARDED["rows"])
        outcomes.append([] if torch.equal(replicated.to_local(), rows) else ["rows"])
        whole = checkpointer.load(f"{path}/sync")["sharded"]["rows"]
        outcomes.append([] if torch.equal(whole, rows) else ["whole rows"])
    return outcomes


def load_elsewhere(path: str) -> list[list[str]]:
    """On another number of ranks: by the functions and by the objects."""
    outcomes = []
    for name in ("sync", "async"):
        into = state(filled=False, turned=True)
        report = dcp.load(into, checkpoint_id=f"{path}/{name}", per_rank="skip", timeout=60)
        outcomes.append(wrong(into, own=False))
        outcomes.append([] if report.skipped == ("own", "name") else [repr(report.skipped)])
        into = state(filled=False)
        found, missing = CheckpointReader(here()).read(f"{path}/{name}", into, per_rank="skip")
        outcomes.append(wrong(found, own=False) + missing)
        refused = failure_of(lambda: CheckpointReader(here()).read(f"{path}/{name}", into))  # noqa: B023
        outcomes.append([] if refused["kind"] == "world_size_mismatch" else [repr(refused)])
    return outcomes


def save_sharded_tensors(path: str) -> list[list[bool]]:
    """By both checkpointers: into another one of its kind, whole, and by the functions."""
    world_size, outcomes = dist.get_world_size(), []
    full = states.whole("sharded_tensor", (2 * world_size, 3))
    rows = full[2 * dist.get_rank() :][:2]
    for make in (make_sync_checkpointer, make_async_checkpointer):
        place = f"{path}/{make.__name__}"
        with make(CONFIG) as checkpointer:
            saved = states.sharded_tensor(world_size, filled=True)
            pending = checkpointer.save(place, {"table": saved})
            if pending is not None:
                pending[1].result()
            into = [states.sharded_tensor(world_size, filled=False) for _ in range(2)]
            checkpointer.load(place, {"table": into[0]}, strict=True)
            dcp.load({"table": into[1]}, checkpoint_id=place, timeout=60)
            outcomes.append([torch.equal(t.local_shards()[0].tensor, rows) for t in into])
            outcomes.append([torch.equal(checkpointer.load(place)["table"], full)])
    return outcomes


def test_sharded_tensors_are_sharded(ranks: Any, tmp_path: Path) -> None:
    found = ranks.run(2, save_sharded_tensors, str(tmp_path))
    assert found == [[[True, True], [True], [True, True], [True]]] * 2


def test_both_checkpointers_and_dcp_engine_read_each_other(ranks: Any, tmp_path: Path) -> None:
    path = str(tmp_path)
    for outcome in ranks.run(2, save_both_ways, path, timeout=120):
        assert outcome == [[]] * 5
    for name in ("sync", "async"):
        with dcp.open(tmp_path / name) as checkpoint:
            assert checkpoint.manifest.world_size == 2
            assert set(checkpoint.per_rank_names) == {"same.bias", "same.step", "own", "name"}
            # Sharded, a replicated DTensor too: all of it shared.
            assert set(checkpoint) == {f"sharded.{key}" for key in KEYS}
    for world_size in (1, 3):
        for outcome in ranks.run(world_size, load_elsewhere, path):
            assert outcome == [[]] * 8


def save_by_functions(path: str) -> None:
    full = states.state(dist.get_world_size(), filled=True)
    dcp.save(full, checkpoint_id=path, timeout=60)


def read_by_objects(path: str) -> list[str]:
    world_size = dist.get_world_size()
    into = states.state(world_size, filled=False, turned=True)
    found, missing = CheckpointReader(here()).read(path, into)
    return states.differences(found, world_size) + missing


def read_replicated(path: str) -> list[str]:
    found, missing = CheckpointReader(here()).read(path, {"plain": None, "objects": None})
    expected = states.plain(filled=True)
    return missing + [
        name for name, tensor in found["plain"].items() if not torch.equal(tensor, expected[name])
    ]


def test_a_reader_reads_what_dcp_engine_saved(ranks: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    ranks.run(2, save_by_functions, path)
    assert ranks.run(2, read_by_objects, path) == [[], []]
    assert ranks.run(3, read_replicated, path) == [[], [], []]


def hooked(directory: str) -> AsyncCheckpointer:
    return make_async_checkpointer(
        CONFIG,
        checkpoint_writer_init_fn=children.hooked_writer,
        checkpoint_writer_init_args={"directory": directory},
    )


def one_rank_fails(path: str) -> list[dict[str, Any]]:
    """In the writer, in its child's life, while staging; a save that works after each."""
    rank = dist.get_rank()
    seen = []
    directory = f"{path}/marks{rank}"
    Path(directory).mkdir()

    def save(step: int, bad: bool = False, **kwargs: Any) -> dict[str, Any]:
        saved = {**state(filled=True), "step": step}
        if bad:
            saved["bad"] = lambda: 0
        began = time.monotonic()
        outcome = failure_of(
            lambda: checkpointer.save(f"{path}/c", saved, **kwargs)[1].result(timeout=60)
        )
        return {**outcome, "seconds": time.monotonic() - began}

    with hooked(directory) as checkpointer:
        seen.append(save(1))
        seen.append(save(2, fail="told" if rank == 1 else ""))
        seen.append(save(3))  # raises what the write before raised
        seen.append(save(4, die=rank == 1))
        seen.append(save(5))
        seen.append(save(6))
        seen.append(save(7, bad=rank == 1))
        seen.append(save(8))
        seen.append(save(9))
        dist.barrier()
        pid = checkpointer._process.pid
        if rank == 1 and pid is not None:
            os.kill(pid, signal.SIGKILL)
        seen.append(save(10))
        seen.append(checkpointer.load(f"{path}/c", {"step": None}))
    return seen


def test_a_failure_on_one_rank_fails_that_write_on_all_and_no_other(
    ranks: Any, tmp_path: Path
) -> None:
    first, second = ranks.run(2, one_rank_fails, str(tmp_path), timeout=170)
    for seen in (first, second):
        good = [seen[at]["type"] for at in (0, 5, 8, 9)]
        assert good == [None] * 4, seen
        assert seen[1]["ranks"] == [1]
        assert "asked to fail: told" in seen[1]["text"]
        assert seen[2]["ranks"] == [1]
        assert seen[3]["ranks"] == [1]
        assert seen[3]["kind"] == "worker_died"
        assert seen[4]["ranks"] == [1]
        assert seen[-1] == {"step": 10}
    assert first[6]["ranks"] == [1]
    assert "bad" in first[6]["text"]
    assert second[6]["type"] == "UnsupportedStateError"
    # Rank 0 is told of that failure now, and gives up; which is not told on, to and fro.
    assert first[7]["ranks"] == [1]
    assert (second[7]["kind"], second[7]["ranks"]) == ("interrupted", [0])
    # Long before any deadline.
    assert max(seen[at]["seconds"] for seen in (first, second) for at in (1, 3, 6)) < 25


def over_a_store_of_their_own(path: str, port: int) -> list[str]:
    """Writers that commit over a barrier's store."""
    config = CheckpointerConfig(
        writer_config=CheckpointWriterConfig(write_barrier_timeout_secs=20),
        barrier_config=BarrierConfig("tcp_store", tcp_args(port)),
    )
    with make_sync_checkpointer(config) as checkpointer:
        checkpointer.save(f"{path}/c", state(filled=True))
        return wrong(checkpointer.load(f"{path}/c", state(filled=False)))


def barriers_of_torch_distributed() -> dict[str, Any]:
    rank = dist.get_rank()
    with DistBarrier(timeout_secs=1.0) as barrier:
        barrier.execute_barrier()
        barrier.execute_barrier()
        outcome = failure_of(barrier.execute_barrier) if rank == 0 else {}
    dist.barrier()
    return outcome


def test_writers_commit_over_the_store_of_a_barrier(ranks: Any, tmp_path: Path) -> None:
    port = free_port()
    assert ranks.run(2, over_a_store_of_their_own, str(tmp_path), port) == [[], []]


def test_a_barrier_of_torch_distributed_names_the_ranks_that_do_not_come(ranks: Any) -> None:
    first, _ = ranks.run(2, barriers_of_torch_distributed)
    assert (first["kind"], first["ranks"]) == ("timeout", [1])
    assert 'in phase "barrier"' in first["text"]
