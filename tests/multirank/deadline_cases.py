"""What the ranks run in ``test_deadlines``: saves and loads in which one of them goes missing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import dcp_engine as dcp
from dcp_engine.coordination.interface import Operation
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.rhythm import Rhythm
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_writer import ShardedWriter
from storage_backends.testing.wrapping import WrappingByteStore

T = TypeVar("T")
Strike = Callable[[], None]

QUICK = Rhythm(interval=0.1, grace=0.3, idle_poll=0.02)
STALL = 1.5
"""Seconds of silence that are death here: fifteen heartbeats."""


def engine(group: Any = None, *, stall_timeout: float = STALL) -> dcp.Engine:
    """An engine whose ranks speak often, so that silence is noticed soon."""
    made = dcp.Engine(group, timeout=40.0, stall_timeout=stall_timeout)
    made._sessions.use(open_session(group, rhythm=QUICK))
    return made


def state(value: float) -> dict[str, Any]:
    """A sharded tensor, a replicated one, objects."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "w": distribute_tensor(torch.full((12, 4), value), mesh, [Shard(0)]),
        "bias": torch.full((7,), value),
        "step": value,
        "own": dcp.PerRank(torch.full((2,), value + dist.get_rank())),
    }


def values(found: dict[str, Any]) -> list[float]:
    """The one value that all of it must be made of."""
    own = found["own"].value - dist.get_rank()
    local = found["w"].to_local() if isinstance(found["w"], DTensor) else found["w"]
    return sorted(
        {*local.flatten().tolist(), *found["bias"].tolist(), found["step"], *own.tolist()}
    )


def save(on: dcp.Engine, path: str, value: float, **options: Any) -> None:
    on.save(state(value), storage_writer=dcp.FileSystemWriter(path), **options)


def load(on: dcp.Engine, path: str, **options: Any) -> list[float]:
    found = state(-1.0)
    on.load(found, storage_reader=dcp.FileSystemReader(path), **options)
    return values(found)


def outcome(run: Callable[[], Any]) -> dict[str, Any]:
    """What became of it on this rank."""
    began = time.monotonic()
    try:
        value = run()
    except dcp.CheckpointException as error:
        return {
            "kind": error.kind,
            "ranks": sorted(error.failures),
            "text": str(error),
            "seconds": time.monotonic() - began,
        }
    return {"kind": None, "ranks": [], "text": "", "value": value}


def strike_in(on: dcp.Engine, phase: str, strike: Strike, *, deciding: bool = False) -> None:
    """In the next operation of ``on``, call ``strike`` on this rank when it is in ``phase``: in
    its own work, or (``deciding``) in the coordinator's decision."""
    session = on._sessions.get(no_dist=False)
    begin = session.begin

    def begin_struck(*args: Any, **kwargs: Any) -> Operation:
        operation = begin(*args, **kwargs)
        step = operation.step
        session.begin = begin  # type: ignore[method-assign]

        def struck(name: str, local: Any, decide: Any, **options: Any) -> tuple[bytes, bytes]:
            def first(then: Any) -> Any:
                def call(*arguments: Any) -> Any:
                    strike()
                    return then(*arguments)

                return call

            if name == phase and deciding:
                decide = first(decide)
            elif name == phase:
                local = first(local)
            return step(name, local, decide, **options)

        operation.step = struck  # type: ignore[method-assign]
        return operation

    session.begin = begin_struck  # type: ignore[method-assign]


# -- a rank goes missing -----------------------------------------------------------------------


def stopped(path: str, kind: str, phase: str, victim: int, deciding: bool) -> dict[str, Any]:
    """The victim is stopped in ``phase``; when all others have raised, it goes on."""
    rank, pids = dist.get_rank(), _pids()
    with engine() as on:
        save(on, path, 1.0)
        on.clear_plan_cache()  # else there is no phase "plan"
        if rank == victim:
            # A while after the begin of the phase, so that it has been heard in it.
            strike_in(
                on, phase, lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGSTOP)),
                deciding=deciding,
            )  # fmt: skip
        result = outcome(lambda: save(on, path, 2.0) if kind == "save" else load(on, path))
        _resume(victim, pids)
        dist.barrier()
        result["then"] = outcome(lambda: load(on, path))
        result["files"] = _files(path)
        dist.barrier()
        save(on, path, 3.0)
        result["last"] = load(on, path)
        return result


def stopped_while_committing(path: str) -> dict[str, Any]:
    """The coordinator is stopped when it has won the decision to commit, before it renames."""
    rank, pids = dist.get_rank(), _pids()
    with engine() as on:
        save(on, path, 1.0)

        class Stopping(ShardedWriter):
            def commit_columns(self, *arguments: Any) -> Any:
                os.kill(os.getpid(), signal.SIGSTOP)
                return super().commit_columns(*arguments)

        result = outcome(
            lambda: on.save(state(2.0), storage_writer=Stopping(FileSystemStore, path))
        )
        assert rank == 0 or result["seconds"] > 0
        before = _files(path)
        _resume(0, pids)
        dist.barrier()
        return {**result, "before": before, "then": load(on, path)}


def killed(path: str, pairs: list[tuple[str, str, int, bool]]) -> dict[str, Any]:
    """In each pair of ranks, one is killed: ``pairs`` says in what, in which phase, and which."""
    groups = [dist.new_group([2 * pair, 2 * pair + 1]) for pair in range(len(pairs))]
    pair, rank = divmod(dist.get_rank(), 2)
    kind, phase, victim, deciding = pairs[pair]
    place = f"{path}/{pair}"

    def content(value: float) -> dict[str, Any]:
        return {"w": torch.full((12, 4), value), "own": dcp.PerRank(rank), "step": value}

    def save_it(value: float) -> None:
        on.save(content(value), storage_writer=dcp.FileSystemWriter(place))

    with engine(groups[pair]) as on:
        save_it(1.0)
        on.clear_plan_cache()
        if rank == victim:
            strike_in(
                on,
                phase,
                lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGKILL)),
                deciding=deciding,
            )
        reader = dcp.FileSystemReader(place)
        result = outcome(
            lambda: save_it(2.0) if kind == "save" else on.load(content(0.0), storage_reader=reader)
        )
    # The survivor finds, by itself, the checkpoint that was there before.
    found: dict[str, Any] = {"w": torch.zeros(12, 4), "step": None}
    dcp.load(found, storage_reader=dcp.FileSystemReader(place), no_dist=True)
    return {**result, "then": [*found["w"].unique().tolist(), found["step"]]}


def store_killed(path: str, phase: str, deciding: bool) -> dict[str, Any]:
    """Rank 0, which hosts the store, is killed."""
    with engine() as on:
        if dist.get_rank() == 0:
            strike_in(on, phase, lambda: os.kill(os.getpid(), signal.SIGKILL), deciding=deciding)
        return outcome(lambda: save(on, path, 2.0))


def _pids() -> list[int]:
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    return pids


def _resume(victim: int, pids: list[int]) -> None:
    """When all others are here, let the victim go on."""
    if dist.get_rank() == victim:
        return
    store = dist.distributed_c10d._get_default_store()
    if store.add("survivors", 1) == len(pids) - 1:
        os.kill(pids[victim], signal.SIGCONT)


def _files(path: str) -> list[str]:
    return sorted(name[:5] for name in os.listdir(path))


# -- a rank is late ----------------------------------------------------------------------------


def hanging(path: str, kind: str, phase: str, deadlines: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 works in ``phase`` until it is told that the operation is over."""
    with engine(stall_timeout=20.0) as on:
        save(on, path, 1.0)
        if dist.get_rank() == 1:
            session = on._sessions.get(no_dist=False)
            begin = session.begin

            def begin_hanging(*args: Any, **kwargs: Any) -> Operation:
                operation = begin(*args, **kwargs)
                step = operation.step

                def hang(name: str, local: Any, decide: Any, **options: Any) -> Any:
                    def wait() -> bytes:
                        while True:
                            operation.check()
                            time.sleep(0.01)

                    return step(name, wait if name == phase else local, decide, **options)

                operation.step = hang  # type: ignore[method-assign]
                session.begin = begin  # type: ignore[method-assign]
                return operation

            session.begin = begin_hanging  # type: ignore[method-assign]
        result = outcome(
            lambda: (
                save(on, path, 2.0, **deadlines) if kind == "save" else load(on, path, **deadlines)
            )
        )
        result["then"] = load(on, path)
        return result


def slow_but_beating(path: str) -> list[float]:
    """One rank's write takes longer than ``stall_timeout``, without a word from its thread."""
    with engine(stall_timeout=0.8) as on:
        if dist.get_rank() == 1:
            strike_in(on, "write", lambda: time.sleep(2.0))
        save(on, path, 4.0)
        return load(on, path)


class SlowStore(WrappingByteStore):
    """Each write of a data file takes a while; counted."""

    def __init__(self, inner: FileSystemStore, begun: Callable[[], None]) -> None:
        super().__init__(inner)
        self.writes = 0
        self._begun = begun

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        if operation == "write" and name.endswith(".safetensors"):
            self.writes += 1
            if self.writes == 2:  # the first one is the header
                self._begun()
            time.sleep(0.1)
        return call()


def failure_in_a_long_write(path: str, failing: int) -> dict[str, Any]:
    """All ranks but one are in a write of many slices when that one fails."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    slow = SlowStore(FileSystemStore(path), lambda: store.add("writing", 1))
    total = 256 << 20  # 64 writes of 4 MiB: six seconds and more
    own = torch.zeros(total if rank != failing else 4, dtype=torch.uint8)

    def fail() -> None:
        while store.add("writing", 0) < world_size - 1:
            time.sleep(0.01)
        raise ValueError("boom in the write")

    with dcp.Engine(timeout=120.0) as on:  # the usual rhythm
        save(on, f"{path}.warm", 1.0)
        if rank == failing:
            strike_in(on, "write", fail)
        result = outcome(
            lambda: on.save(
                {"own": dcp.PerRank(own)}, storage_writer=ShardedWriter(lambda _: slow, path)
            )
        )
    dist.barrier()
    return {**result, "writes": slow.writes, "left": sorted(p.name for p in Path(path).iterdir())}


# -- several things at once --------------------------------------------------------------------


def overlapping_groups(path: str, rounds: int) -> list[list[float]]:
    """Two saves at once on each rank: of the whole job, and of its half of it."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    results: list[list[float]] = []

    def of_half() -> None:
        with dcp.Engine(halves[mine], timeout=60.0) as on:
            for number in range(rounds):
                place = f"{path}/half{mine}"
                content = {"v": torch.full((5,), number + 10.0 * mine), "step": number}
                on.save(content, storage_writer=dcp.FileSystemWriter(place), coordinator_rank=1)
                found: dict[str, Any] = {"v": torch.zeros(5), "step": None}
                on.load(found, storage_reader=dcp.FileSystemReader(place))
                results.append([*found["v"].unique().tolist(), found["step"]])

    thread = threading.Thread(target=of_half)
    with dcp.Engine(timeout=60.0) as on:
        thread.start()
        for number in range(rounds):
            save(on, f"{path}/whole", float(number))
            assert load(on, f"{path}/whole") == [number]
        thread.join()
    return results


def beside_training(path: str, saves: int) -> tuple[list[int], list[float]]:
    """A thread saves while the main thread trains: collectives on the same group."""
    content = state(5.0)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with dcp.Engine(timeout=60.0) as on:
                for _ in range(saves):
                    on.save(content, storage_writer=dcp.FileSystemWriter(path))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    sums: list[int] = []
    # At least so many, and the same number on every rank: they agree whether to go on.
    going = torch.ones(1, dtype=torch.int64)
    while len(sums) < 50 or int(going):
        step = torch.tensor([len(sums) + dist.get_rank()])
        dist.all_reduce(step)
        sums.append(int(step))
        going = torch.tensor([int(thread.is_alive())])
        dist.all_reduce(going)
    thread.join()
    if failures:
        raise failures[0]
    with dcp.Engine(timeout=60.0) as on:
        return sums, load(on, path)


def without_a_backend(path: str) -> dict[str, Any]:
    """The group's backend moves no byte; whoever used it would get nonsense."""
    rank = dist.get_rank()
    content = {"bias": torch.arange(6.0), "own": dcp.PerRank(torch.full((2,), rank)), "step": 3}
    with dcp.Engine(timeout=60.0) as on:
        for _ in range(2):
            on.save(content, storage_writer=dcp.FileSystemWriter(path))
        found: dict[str, Any] = {
            "bias": torch.zeros(6),
            "own": dcp.PerRank(torch.zeros(2, dtype=torch.int64)),
            "step": None,
        }
        on.load(found, storage_reader=dcp.FileSystemReader(path))
        failed = outcome(
            lambda: on.save(
                {"bad": torch.zeros(2, device="meta")} if rank else content,
                storage_writer=dcp.FileSystemWriter(path),
            )
        )
    return {
        "backend": dist.get_backend(),
        "found": [found["bias"].tolist(), found["own"].value.tolist(), found["step"]],
        "failed": failed["ranks"],
    }
