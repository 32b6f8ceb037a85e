"""What several ranks need, read once: the same values, the bytes counted, and every failure."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dcp_engine as dcp
from dcp_engine.loader import shared_reads
from storage_backends.testing.faulty_calls import CallFault, faulty_reader
from tests.multirank import states

pytestmark = pytest.mark.multirank


def save(state: dict[str, Any], path: str, **options: Any) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), **options)


def load(state: dict[str, Any], path: str, **options: Any) -> dcp.LoadReport:
    return dcp.load(state, storage_reader=dcp.FileSystemReader(path), **options)


def sharded(placement: Any, shapes: dict[str, tuple[int, ...]], *, filled: bool) -> dict[str, Any]:
    mesh = states.meshes(dist.get_world_size())[0]
    result = {}
    for name, shape in shapes.items():
        tensor = states.whole(name, shape)
        result[name] = distribute_tensor(
            tensor if filled else torch.zeros_like(tensor), mesh, [placement]
        )
    return result


def wrong(state: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [
        name
        for name, shape in shapes.items()
        if not torch.equal(_full(state[name]), states.whole(name, shape))
    ]


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def round_trip(path: str, shared: str, turned: bool) -> list[str]:
    """Everything that a state can hold, small and large rounds."""
    world_size = dist.get_world_size()
    save(states.state(world_size, filled=True), path)
    problems = []
    for budget in (shared_reads.BUDGET_BYTES, 1 << 20):
        loaded = states.state(world_size, filled=False, turned=turned)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dcp_engine.loader.share.BUDGET_BYTES", budget)
            load(loaded, path, shared_reads=shared)
        problems += states.differences(loaded, world_size)
    return problems


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_kind_of_state(ranks: Any, tmp_path: Path, world_size: int, turned: bool) -> None:
    found = ranks.run(world_size, round_trip, str(tmp_path / "c"), "once", turned)
    assert found == [[]] * world_size


REPLICATED = {"one": (300, 1000), "two": (1 << 19,), "three": (7,)}


def load_replicated(
    path: str, shared: str, budget: int = shared_reads.BUDGET_BYTES
) -> tuple[list[str], int | None]:
    state = {name: states.whole(name, shape) for name, shape in REPLICATED.items()}
    save(state, path)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcp_engine.loader.share.BUDGET_BYTES", budget)
        report = load(loaded, path, shared_reads=shared)
    return wrong(loaded, REPLICATED), report.bytes_read


def test_a_replicated_state_is_read_once(ranks: Any, tmp_path: Path) -> None:
    size = sum(4 * torch.Size(shape).numel() for shape in REPLICATED.values())
    once = ranks.run(4, load_replicated, str(tmp_path / "once"), "once")
    assert once == [([], size)] * 4
    direct = ranks.run(4, load_replicated, str(tmp_path / "direct"), "direct")
    assert direct == [([], 4 * size)] * 4
    # Two blocks at a time: one rank reads, all others take it. Less: nothing is handed on.
    by_turns = ranks.run(4, load_replicated, str(tmp_path / "turns"), "once", 4 << 16)
    assert by_turns == once
    assert ranks.run(4, load_replicated, str(tmp_path / "none"), "once", 1 << 16) == direct
    # One machine, one local file system.
    assert ranks.run(4, load_replicated, str(tmp_path / "auto"), "auto") == direct


GRID = {"a": (512, 900), "b": (1000, 301), "c": (64, 3, 500)}


def save_sharded(path: str, dim: int) -> None:
    save(sharded(Shard(dim), GRID, filled=True), path)


def load_sharded(path: str, dim: int, shared: str) -> tuple[list[str], int | None]:
    state = sharded(Shard(dim), GRID, filled=False)
    report = load(state, path, shared_reads=shared)
    return wrong(state, GRID), report.bytes_read


@pytest.mark.parametrize(
    ("before", "after", "saved", "loaded", "bound"),
    [
        (0, 1, 2, 2, 1.1),
        (0, 1, 4, 4, 1.1),
        (1, 0, 2, 3, 1.1),
        (0, 0, 2, 4, 1.02),
        (0, 0, 4, 3, 1.02),
    ],
)
def test_other_layouts_read_what_they_need(
    ranks: Any, tmp_path: Path, before: int, after: int, saved: int, loaded: int, bound: float
) -> None:
    path = str(tmp_path / "c")
    size = sum(4 * torch.Size(shape).numel() for shape in GRID.values())
    ranks.run(saved, save_sharded, path, before)
    for problems, count in ranks.run(loaded, load_sharded, path, after, "once"):
        assert problems == []
        assert size <= count <= bound * size
    for problems, count in ranks.run(loaded, load_sharded, path, after, "direct"):
        assert problems == []
        assert count >= size


LARGE = {"weights": (256, 64, 64), "rest": (5,)}


def fail(path: str, faults: list[CallFault]) -> dict[str, Any]:
    """Try to load; then see whether the job's own group still works."""
    rank = dist.get_rank()
    state = {name: torch.zeros(shape) for name, shape in LARGE.items()}
    reader = faulty_reader(dcp.FileSystemReader(path), faults, rank=rank)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Many rounds.
            patch.setattr("dcp_engine.loader.share.BUDGET_BYTES", 1 << 20)
            dcp.load(state, storage_reader=reader, shared_reads="once", timeout=30)
    except dcp.CheckpointException as error:
        result = {
            "failures": sorted(error.failures),
            "kind": error.kind,
            "text": str(error),
            "file": error.file,
            "tensor": error.tensor,
        }
    else:
        result = {"failures": [], "wrong": wrong(state, LARGE)}
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    return result


def save_large(path: str) -> None:
    state = {name: states.whole(name, shape) for name, shape in LARGE.items()}
    save(state, path)


def flip(checkpoint: Path, byte: int) -> tuple[str, int]:
    """Turn one bit round in the middle of the largest data file; its name and the position."""
    file = max(checkpoint.glob("data-*/*.safetensors"), key=lambda p: p.stat().st_size)
    data = np.memmap(file, mode="r+")
    data[byte] ^= 4
    data.flush()
    return file.name, byte


def test_a_flipped_bit_is_named_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    ranks.run(2, save_large, str(path))
    name, _ = flip(path, 1 << 20)
    readers = set()
    for result in ranks.run(4, fail, str(path), []):
        assert result["kind"] == "digest_mismatch", result
        assert result["file"].endswith(name)
        assert result["tensor"] == "weights"
        # Only the rank that read the block.
        assert len(result["failures"]) == 1, result["text"]
        readers.update(result["failures"])
    assert len(readers) == 1


class Boom(Exception):
    """What the injected fault raises."""


@pytest.mark.parametrize("nth", [1, 3])
def test_a_read_that_fails_stops_all_ranks(ranks: Any, tmp_path: Path, nth: int) -> None:
    path = str(tmp_path / "c")
    ranks.run(2, save_large, path)
    fault = CallFault(method="read_columns", error=Boom("injected"), ranks=frozenset([1]), nth=nth)
    for result in ranks.run(3, fail, path, [fault]):
        assert result["failures"] == [1], result["text"]
        assert "injected" in result["text"]
    assert ranks.run(3, fail, path, []) == [{"failures": [], "wrong": []}] * 3


def lose_a_rank(path: str) -> dict[str, Any]:
    """Rank 1 is killed between its first read and its second one."""

    class Killed(dcp.FileSystemReader):
        calls = 0

    def read(self: Any, *args: Any) -> int:
        if dist.get_rank() == 1:
            self.calls += 1
            if self.calls == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return dcp.FileSystemReader.read_columns(self, *args)

    Killed.read_columns = read  # type: ignore[method-assign, assignment]
    state = {name: torch.zeros(shape) for name, shape in LARGE.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcp_engine.loader.share.BUDGET_BYTES", 1 << 20)
        try:
            dcp.load(
                state,
                storage_reader=Killed(path),
                shared_reads="once",
                timeout=20,
                stall_timeout=5,
            )
        except dcp.CheckpointException as error:
            return {"kind": error.kind, "text": str(error), "failures": sorted(error.failures)}
    return {"kind": None}


def test_a_rank_that_is_killed_is_named(ranks: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    ranks.run(2, save_large, path)
    results = ranks.run(3, lose_a_rank, path, expect_kill=[1])
    assert results[1] is None
    for result in (results[0], results[2]):
        assert result["kind"] in {"rank_failed", "stalled", "timeout"}, result
        assert "rank 1" in result["text"] or result["failures"] == [1], result


def apart(path: str) -> tuple[list[str], int | None]:
    """A replicated DTensor on half of the ranks only, as a group of their own."""
    half = dist.new_group([1, 3])
    state = {name: states.whole(name, shape) for name, shape in REPLICATED.items()}
    if dist.get_rank() not in (1, 3):
        return [], None
    save(state, path, process_group=half)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    report = load(loaded, path, process_group=half, shared_reads="once")
    return wrong(loaded, REPLICATED), report.bytes_read


def test_a_group_of_some_ranks(ranks: Any, tmp_path: Path) -> None:
    size = sum(4 * torch.Size(shape).numel() for shape in REPLICATED.values())
    found = ranks.run(4, apart, str(tmp_path / "c"))
    assert found[1] == found[3] == ([], size)


def not_contiguous(path: str) -> list[str]:
    """Destinations whose memory is not in row-major order."""
    shapes = {"x": (300, 200), "y": (40, 50, 60)}
    state = {name: states.whole(name, shape) for name, shape in shapes.items()}
    save(state, path)
    loaded = {
        "x": torch.zeros(200, 300).t(),
        "y": torch.zeros(40, 50, 120)[..., ::2],
    }
    load(loaded, path, shared_reads="once")
    columns = sharded(Replicate(), shapes, filled=False)
    load(columns, path, shared_reads="once")
    return wrong(loaded, shapes) + wrong(columns, shapes)


def test_memory_of_any_order(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, not_contiguous, str(tmp_path / "c")) == [[], []]


def alone(path: str) -> int | None:
    save({"x": torch.ones(100)}, path)
    state = {"x": torch.zeros(100)}
    report = load(state, path, shared_reads="once", no_dist=True)
    assert state["x"].eq(1).all()
    return report.bytes_read


def test_a_load_of_one_rank_alone(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(2, alone, str(tmp_path / "c")) == [400, 400]


def test_a_word_that_is_none_of_the_three(tmp_path: Path) -> None:
    with pytest.raises(dcp.UsageError, match="shared_reads is 'twice'"):
        load({}, str(tmp_path), shared_reads="twice")


NO_COPY_KERNEL = torch.uint4


def load_unusual(path: str, shared: str) -> list[str]:
    """Into tensors that torch's own copies refuse, whole and in pieces."""
    bits = torch.arange(200_000).remainder(251).to(torch.uint8)
    state = {"w": bits.view(NO_COPY_KERNEL).view(500, 400), "b": bits[:7].view(NO_COPY_KERNEL)}
    state["f"] = bits.view(torch.float32)
    save(state, path)
    with torch.inference_mode():
        plain = torch.zeros(500, 400, dtype=torch.uint8)
        turned = torch.zeros(400, 500, dtype=torch.uint8)
        row, floats = torch.zeros(7, dtype=torch.uint8), torch.zeros(100_000)[::2]
    problems = []
    for into in (plain, turned.t()):
        loaded = {"w": into.view(NO_COPY_KERNEL), "b": row.view(NO_COPY_KERNEL), "f": floats}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dcp_engine.loader.share.BUDGET_BYTES", 1 << 20)
            load(loaded, path, shared_reads=shared)
        if not torch.equal(into, bits.view(500, 400)) or not torch.equal(row, bits[:7]):
            problems.append(f"{tuple(into.stride())}: other bytes")
        if not torch.equal(floats.contiguous().view(torch.uint8), bits):
            problems.append("other floats")
    return problems


@pytest.mark.parametrize("shared", ["direct", "once"])
def test_tensors_without_a_copy_kernel_and_inference_tensors(
    ranks: Any, tmp_path: Path, shared: str
) -> None:
    assert ranks.run(2, load_unusual, str(tmp_path / "c"), shared) == [[], []]
