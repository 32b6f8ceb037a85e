"""What ranks do in the tests of asynchronous saves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

import dcp_engine as dcp
from dcp_engine.staging.arena import Arena
from tests.async_saver.gated import (
    FailingWriter,
    Gate,
    GatedWriter,
    HeldWriter,
    copying_begins_when,
    wait_until,
)
from tests.multirank import states

LIMIT = 40
KINDS = {kind.value: kind for kind in dcp.AsyncCheckpointerType}


def content(value: float) -> dict[str, Any]:
    """Sharded, replicated and plain tensors, objects."""
    mesh, _ = states.meshes(dist.get_world_size())
    return {
        "sharded": distribute_tensor(
            torch.full((64, 50), value), mesh, [torch.distributed.tensor.Shard(0)]
        ),
        "replicated": distribute_tensor(torch.full((300,), value), mesh),
        "plain": torch.full((7,), value),
        "own": dcp.PerRank(torch.full((3,), value + dist.get_rank())),
        "step": value,
    }


def loaded(path: str) -> dict[str, Any]:
    """What is stored there, as this rank sees it."""
    state = content(-5.0)
    state["own"] = dcp.PerRank(torch.zeros(3))
    dcp.load(state, checkpoint_id=path)
    return {
        "sharded": state["sharded"].full_tensor().unique().tolist(),
        "replicated": state["replicated"].full_tensor().unique().tolist(),
        "plain": state["plain"].unique().tolist(),
        "own": (state["own"].value - dist.get_rank()).unique().tolist(),
        "step": state["step"],
    }


def holds(path: str, value: float) -> bool:
    """Whether the whole checkpoint has this value."""
    found = loaded(path)
    return found == {
        "sharded": [value],
        "replicated": [value],
        "plain": [value],
        "own": [value],
        "step": value,
    }


def spoil(state: dict[str, Any]) -> None:
    """Change all tensors at once."""
    with torch.no_grad():
        for value in state.values():
            tensor = value.value if isinstance(value, dcp.PerRank) else value
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()


def save(
    engine: dcp.Engine, kind: str, path: str, value: float, **options: Any
) -> dcp.AsyncSaveResponse:
    """Begin a save, and change the state at once."""
    state = content(value)
    options.setdefault("timeout", LIMIT)
    if "storage_writer" not in options:
        options["checkpoint_id"] = path
    response = engine.async_save(state, async_checkpointer_type=KINDS[kind], **options)
    spoil(state)
    return response


def outcome(response: dcp.AsyncSaveResponse) -> dict[str, Any]:
    """How it ended, and how long that took."""
    begin = time.monotonic()
    try:
        response.result(LIMIT)
    except dcp.CheckpointException as error:
        return {
            "failed": sorted(error.failures),
            "kind": error.kind,
            "text": str(error),
            "seconds": time.monotonic() - begin,
        }
    return {"failed": [], "kind": None}


@contextmanager
def no_memory_on(rank: int) -> Iterator[None]:
    """No arena can be had there."""

    def refuse(self: Arena, nbytes: int) -> bool:
        raise dcp.StagingError("no memory", kind="out_of_memory")

    reserve = Arena.reserve
    if dist.get_rank() == rank:
        Arena.reserve = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Arena.reserve = reserve  # type: ignore[method-assign]


def collectives() -> int:
    """How many the training group has seen."""
    group: Any = dist.distributed_c10d._get_default_group()
    return int(group._get_sequence_number_for_group())


def save_in_turn(path: str, kind: str) -> dict[str, Any]:
    """Three saves, each changed at once; then one rank fails; then one cannot begin."""
    rank, found = dist.get_rank(), {}
    with dcp.Engine() as engine:
        for turn in range(3):
            save(engine, kind, path, float(turn)).result(LIMIT)
            found[f"turn {turn}"] = holds(path, float(turn))
        failing = FailingWriter(path, unpicklable=True) if rank == 1 else dcp.FileSystemWriter(path)
        found["failing"] = outcome(save(engine, kind, path, 7.0, storage_writer=failing))
        found["old"] = holds(path, 2.0)
        try:
            state = content(8.0)
            if rank == 1:
                state["bad"] = object.__new__(type("Local", (), {}))
            response = engine.async_save(
                state, checkpoint_id=path, async_checkpointer_type=KINDS[kind], timeout=LIMIT
            )
        except dcp.UnsupportedStateError as error:
            found["at the call"] = {"text": str(error)}
        else:
            found["at the call"] = outcome(response)
        save(engine, kind, path, 9.0).result(LIMIT)
        found["new"] = holds(path, 9.0)
        with no_memory_on(1):
            try:
                found["no memory"] = outcome(save(engine, kind, path, 10.0))
            except dcp.StagingError as error:
                found["no memory"] = {"text": str(error)}
            response = save(engine, kind, path, 11.0, on_low_memory="sync")
            found["waited"] = response.done()
            response.result(LIMIT)
        found["direct"] = holds(path, 11.0)
        state = content(12.0)
        before = collectives()
        engine.async_save(
            state, checkpoint_id=path, async_checkpointer_type=KINDS[kind], timeout=LIMIT
        ).result(LIMIT)
        found["collectives"] = collectives() - before
        dist.barrier()
        assert collectives() > before, "they are counted"
        found["worker"] = engine.worker_pid not in (None, os.getpid())
    return found


class AskingPlanner(dcp.DefaultSavePlanner):
    """Leaves word of the process group it finds where it runs."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes

    def create_local_plan(self) -> dcp.SavePlan:
        total = torch.ones(1)
        dist.all_reduce(total)
        note = f"{os.getpid()} {dist.get_backend()} {dist.get_rank()} {int(total)}"
        (self.notes / f"{dist.get_rank()}").write_text(note)
        return super().create_local_plan()


class LeavingPlanner(dcp.DefaultSavePlanner):
    """Fails in the middle of a collective, of which one rank has sent its part."""

    def create_local_plan(self) -> dcp.SavePlan:
        if dist.get_rank() == 0:
            dist.all_reduce(torch.full((1,), 100.0), async_op=True)
        raise ValueError("out of here")


KILLED_IN = {
    "saving": [
        (1, "begin_save"),
        (1, "write_columns"),
        (0, "observe"),
        (0, "write_columns"),
        (0, "commit_columns"),
        (1, "staging"),
        (1, "join"),
    ],
    "starting": [(0, "start")],
    "meeting": [(1, "start"), (0, "join"), (0, "joined"), (1, "joined")],
    "leaving": [(0, "tidying"), (1, "tidying"), (0, "left"), (1, "left")],
    "stopped": [
        (0, "stopped write_columns"),
        (1, "stopped write_columns"),
        (0, "stopped join"),
        (1, "stopped join"),
    ],
}
"""Ranks, and methods of the writer; ``observe`` is in the plan, ``start`` before all of them,
``staging`` while the parent copies in the background, ``tidying`` after a failure, and for the
others see ``HELD``."""
HELD = {
    "join": ("torch.distributed:init_process_group", False),
    "joined": ("torch.distributed:init_process_group", True),
    "left": ("dcp_engine.coordination.operation:StoreOperation.close", True),
}
"""Calls in a worker, and whether it is held up after them: as it is about to meet the other
workers, when it has met them, and when it has left the operation and has yet to answer."""
STALL = 12.0
"""Seconds for which a worker may be stopped."""


def kill_idle_worker(engine: dcp.Engine) -> None:
    """The next save starts another one."""
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: engine.worker_pid != pid, "the worker's end")


def save_and_kill_while_copying(
    engine: dcp.Engine, path: str, value: float
) -> dcp.AsyncSaveResponse:
    """The worker has nothing to do with the save yet."""
    with copying_begins_when() as begin:
        state = content(value)
        response = engine.async_save(
            state,
            checkpoint_id=path,
            async_checkpointer_type=KINDS["process"],
            background_staging=True,
            timeout=LIMIT,
        )
        kill_idle_worker(engine)
        begin.set()
        engine.wait_for_staging(LIMIT)
    spoil(state)
    return response


def held_up(path: str, gate: Gate, method: str) -> dcp.StorageWriter:
    """A writer whose worker stops at the gate, in a method or at a moment of its own."""
    if method == "tidying":
        return FailingWriter(path, gate=gate)
    if method in HELD:
        where, after = HELD[method]
        return HeldWriter(path, gate, where, after=after)
    return GatedWriter(path, gate, method)


def kill_workers(path: str, gates: str, moments: str) -> list[dict[str, Any]]:
    """Kill a rank's worker in a method, for several; after each the next save works."""
    rank = dist.get_rank()
    found = []
    with dcp.Engine() as engine:
        save(engine, "process", path, 0.0).result(LIMIT)
        for number, (victim, moment) in enumerate(KILLED_IN[moments]):
            method = moment.removeprefix("stopped ")
            value = float(number)
            gate = Gate(Path(gates) / f"{number}-{rank}")
            writer: dcp.StorageWriter = dcp.FileSystemWriter(path)
            if rank == victim:
                writer = held_up(path, gate, method)
                if method in ("start", "join", "joined"):
                    kill_idle_worker(engine)  # a new one joins the others anew
            if method == "staging" and rank == victim:
                response = save_and_kill_while_copying(engine, path, 99.0)
            else:
                options = {"stall_timeout": STALL} if moment != method else {}
                response = save(engine, "process", path, 99.0, storage_writer=writer, **options)
            if rank == victim and method != "staging":
                if method != "start":
                    gate.wait_for_visitor()
                assert engine.worker_pid is not None
                os.kill(engine.worker_pid, signal.SIGKILL if moment == method else signal.SIGSTOP)
            killed = outcome(response)
            before = holds(path, value if killed["failed"] else 99.0)
            save(engine, "process", path, value + 1).result(LIMIT)
            found.append(
                {
                    "victim": victim,
                    "method": moment,
                    **killed,
                    "before": before,
                    "after": holds(path, value + 1),
                }
            )
        state = content(50.0)
        del state["own"]  # no planner but the engine's own knows of PerRank
        pid = engine.worker_pid
        for planner in (LeavingPlanner(), AskingPlanner(Path(gates))):
            response = engine.async_save(
                state,
                checkpoint_id=f"{path}-planned",
                planner=planner,
                async_checkpointer_type=KINDS["process"],
                timeout=LIMIT,
            )
            assert ("out of here" in outcome(response).get("text", "")) is (
                isinstance(planner, LeavingPlanner)
            )
        into = content(0.0)
        del into["own"]
        dcp.load(into, checkpoint_id=f"{path}-planned")
        planned = into["sharded"].full_tensor().unique().tolist() == [50.0]
        found.append({"planner": planned, "pid": pid})
    return found


def save_in_two_groups(path: str) -> dict[str, bool]:
    """An engine of all ranks and one of each rank alone, at once, beside collectives."""
    rank = dist.get_rank()
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    with dcp.Engine() as together, dcp.Engine(groups[rank]) as alone:
        first = save(together, "thread", f"{path}/all", 1.0)
        second = alone.async_save(
            {"w": torch.full((9,), float(rank))}, checkpoint_id=f"{path}/{rank}"
        )
        total = torch.ones(1)
        for _ in range(20):
            dist.all_reduce(total)
        first.result(LIMIT)
        second.result(LIMIT)
    into = {"w": torch.zeros(9)}
    dcp.load(into, checkpoint_id=f"{path}/{rank}", no_dist=True)
    return {
        "all": holds(f"{path}/all", 1.0),
        "own": into["w"].tolist() == [float(rank)] * 9,
    }


class Uncopyable:
    """What no ``user_metadata`` may hold."""

    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise ValueError("no copy of this")


def fail_by_an_argument(path: str, kind: str) -> dict[str, Any]:
    """The coordinator cannot read an extra file, then the other rank's metadata cannot be copied;
    each time the next save is to work."""
    found: dict[str, Any] = {}
    arguments: list[dict[str, Any]] = [
        {"extra_files": {"config.json": Path(path) / "missing-file"}},
        {"user_metadata": {"x": Uncopyable()}},
    ]
    with dcp.Engine() as engine:
        for victim, argument in enumerate(arguments):
            mine = argument if dist.get_rank() == victim else {}
            try:
                found[f"on {victim}"] = outcome(save(engine, kind, path, 1.0, **mine))
            except (dcp.UsageError, ValueError) as error:
                found[f"on {victim}"] = {"text": str(error)}
            save(engine, kind, path, 2.0 + victim).result(LIMIT)
            found[f"after {victim}"] = holds(path, 2.0 + victim)
    return found


def save_and_never_look(path: str, kind: str) -> dict[str, Any]:
    """The first save cannot begin on rank 1; saves follow, and nobody looks at any of them."""
    raised: list[str | None] = []
    failures: list[dict[str, Any] | None] = []
    with dcp.Engine() as engine:
        for turn in range(5):
            state = content(float(turn))
            if turn == 0 and dist.get_rank() == 1:
                state["bad"] = object.__new__(type("Local", (), {}))
            try:
                response = engine.async_save(
                    state,
                    checkpoint_id=f"{path}/{turn}",
                    async_checkpointer_type=KINDS[kind],
                    timeout=LIMIT,
                )
            except dcp.CheckpointError as error:
                raised.append(error.kind)
                failures.append(None)
                continue
            raised.append(None)
            wait([response], LIMIT)
            error = response.unseen_failure()
            failed = sorted(error.failures) if isinstance(error, dcp.CheckpointException) else None
            failures.append(failed and {"failed": failed, "kind": error.kind})
    return {"raised": raised, "failures": failures, "last": holds(f"{path}/4", 4.0)}


def fail_alone(path: str) -> dict[str, Any]:
    """A save of this process alone, then saves without collectives that fail."""
    failed: dict[str, list[int]] = {}
    with dcp.Engine() as engine:
        engine.async_save(
            {"w": torch.ones(3)}, checkpoint_id=f"{path}/{dist.get_rank()}", no_dist=True
        ).result(LIMIT)
        options: dict[str, Any] = {"use_collectives": False, "save_id": "a" * 32}
        for kind in KINDS:
            writer = FailingWriter(f"{path}/{kind}")
            response = save(engine, kind, path, 1.0, storage_writer=writer, **options)
            failed[kind] = outcome(response)["failed"]
        try:
            writer = FailingWriter(f"{path}/save")
            engine.save({"w": torch.ones(3)}, storage_writer=writer, **options)
        except dcp.CheckpointException as error:
            failed["save"] = sorted(error.failures)
        assert engine._async is not None
        return {"failed": failed, "worker": engine._async._process._rank}
