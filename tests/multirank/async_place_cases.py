"""What ranks do in the tests of asynchronous saves over other stores, groups and models."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dcp_engine as dcp
from tests.async_saver.gated import Gate, GatedWriter, copying_begins_when, wait_until
from tests.async_saver.test_process import gone
from tests.multirank import async_cases
from tests.multirank.async_cases import KINDS, LIMIT, holds, outcome, save

PROCESS = KINDS["process"]


# -- other stores and groups -------------------------------------------------------------------


def save_over_a_file_store(path: str, notes: str) -> dict[str, Any]:
    """Two groups of all ranks over a FileStore, each with an engine and so with workers of its
    own; then a worker of one of them is killed."""
    assert "MASTER_ADDR" not in os.environ
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{notes}/store", rank=rank, world_size=world_size
    )
    second_group = dist.new_group(list(range(world_size)))
    found: dict[str, Any] = {}
    with dcp.Engine() as first, dcp.Engine(second_group) as second:
        responses = [
            save(engine, "process", f"{path}/{number}", 1.0 + number)
            for number, engine in enumerate((first, second))
        ]
        for response in responses:
            response.result(LIMIT)
        found["whole"] = [holds(f"{path}/{number}", 1.0 + number) for number in (0, 1)]
        found["workers"] = {first.worker_pid, second.worker_pid, os.getpid()}
        gate = Gate(Path(notes) / f"gate-{rank}")
        writer: dcp.StorageWriter = dcp.FileSystemWriter(f"{path}/0")
        if rank == 1:
            writer = GatedWriter(f"{path}/0", gate, "write_columns")
        struck = save(first, "process", f"{path}/0", 5.0, storage_writer=writer)
        if rank == 1:
            gate.wait_for_visitor()
            assert first.worker_pid is not None
            os.kill(first.worker_pid, signal.SIGKILL)
        beside = save(second, "process", f"{path}/1", 6.0)
        found["killed"] = outcome(struck)
        beside.result(LIMIT)
        save(first, "process", f"{path}/0", 7.0).result(LIMIT)
        found["after"] = [holds(f"{path}/0", 7.0), holds(f"{path}/1", 6.0)]
    dist.barrier()
    return found


def save_over_a_hash_store(path: str) -> dict[str, Any]:
    """A group of one rank, whose store no other process can reach."""
    dist.destroy_process_group()
    store: Any = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with dcp.Engine() as engine:
        save(engine, "process", path, 1.0).result(LIMIT)
        planner = async_cases.AskingPlanner(Path(path))
        state = {"w": torch.ones(3)}
        engine.async_save(
            state,
            checkpoint_id=f"{path}/planned",
            planner=planner,
            async_checkpointer_type=PROCESS,
        ).result(LIMIT)
        return {"whole": holds(path, 1.0), "planner": (Path(path) / "0").read_text().split()[1:]}


# -- failures in the worker --------------------------------------------------------------------


class Struck(Exception):
    """What an injected fault raises."""


def _struck(owner: Any, method: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if method == self.struck and os.getpid() != self.parent:
            raise Struck(method)
        return getattr(super(owner, self), method)(*args, **kwargs)

    return call


WRITER_COLUMNS = ("reset", "observe", "begin_save", "write_columns", "commit_columns")
WRITER_ITEMS = (
    "set_up_storage_writer",
    "storage_meta",
    "prepare_local_plan",
    "prepare_global_plan",
    "write_data",
    "finish",
)
PLANNER = (
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "resolve_data",
)
COORDINATORS = ("observe", "commit_columns", "prepare_global_plan", "finish", "create_global_plan")


class StruckWriter(dcp.FileSystemWriter):
    """Raises in one method, in the worker only. Those that are overridden here leave it a writer
    of columns."""

    def __init__(self, path: str, struck: str) -> None:
        super().__init__(path)
        self.struck, self.parent = struck, os.getpid()


class StruckItemWriter(StruckWriter):
    """Has overrides that only DCP's life cycle calls."""


class StruckPlanner(dcp.DefaultSavePlanner):
    """Raises in one method, in the worker only."""

    def __init__(self, struck: str) -> None:
        super().__init__()
        self.struck, self.parent = struck, os.getpid()


for _class, _names in (
    (StruckWriter, WRITER_COLUMNS),
    (StruckItemWriter, WRITER_ITEMS),
    (StruckPlanner, PLANNER),
):
    for _name in _names:
        setattr(_class, _name, _struck(_class, _name))


def fail_everywhere(path: str, *, thorough: bool) -> list[dict[str, Any]]:
    """Every method of writer and planner raises in the worker: on one rank, or on each in turn."""
    rank = dist.get_rank()
    cases = [
        *((method, "columns") for method in WRITER_COLUMNS),
        *((method, "items") for method in WRITER_ITEMS),
        *((method, "planner") for method in PLANNER),
    ]
    found = []
    with dcp.Engine() as engine:
        save(engine, "process", path, 0.0).result(LIMIT)
        pid = engine.worker_pid
        for turn, (method, where) in enumerate(cases):
            for victim in (0,) if method in COORDINATORS else (0, 1) if thorough else (turn % 2,):
                here = rank == victim
                kind = StruckWriter if where == "columns" else StruckItemWriter
                writer = kind(path, method if here and where != "planner" else "")
                planner = StruckPlanner(method if here and where == "planner" else "")
                failed = outcome(
                    _save_planned(engine, writer, planner if where != "columns" else None, 9.0)
                )
                found.append(
                    {"method": f"{where} {method}", "victim": victim, **failed}
                    | {"old": holds(path, 0.0), "same worker": engine.worker_pid == pid}
                )
        save(engine, "process", path, 10.0).result(LIMIT)
        found.append({"new": holds(path, 10.0), "left": len(list(Path(path).glob("data-*")))})
    return found


def _save_planned(
    engine: dcp.Engine,
    writer: dcp.StorageWriter,
    planner: dcp.SavePlanner | None,
    value: float,
) -> dcp.AsyncSaveResponse:
    state = async_cases.content(value)
    if planner is not None:
        del state["own"]  # no planner but the engine's own knows of PerRank
    response = engine.async_save(
        state,
        storage_writer=writer,
        planner=planner,
        async_checkpointer_type=PROCESS,
        timeout=LIMIT,
    )
    async_cases.spoil(state)
    return response


class HomeBody(int):
    """JSON like any number, but it cannot be unpickled in another process."""

    def __reduce__(self) -> Any:
        return _at_home, (int(self), os.getpid())


def _at_home(value: int, pid: int) -> HomeBody:
    if os.getpid() != pid:
        raise Struck("far from home")
    return HomeBody(value)


def fail_before_the_worker_begins(path: str) -> list[dict[str, Any]]:
    """On each rank in turn, what its worker is sent cannot be unpickled; each time with the next
    save."""
    found = []
    with dcp.Engine() as engine:
        save(engine, "process", path, 0.0).result(LIMIT)
        pid = engine.worker_pid
        for victim in range(dist.get_world_size()):
            here = dist.get_rank() == victim
            metadata = {"epoch": HomeBody(3) if here else 3}
            failed = outcome(save(engine, "process", path, 99.0, user_metadata=metadata))
            old = holds(path, float(victim))
            save(engine, "process", path, victim + 1.0).result(LIMIT)
            found.append(failed | {"old": old, "new": holds(path, victim + 1.0)})
            assert engine.worker_pid == pid
    return found


# -- background staging under FSDP2 ------------------------------------------------------------


def stage_behind_fused_steps(path: str, kind: str) -> dict[str, Any]:
    """Copying begins when the hook waits for it; without the hook, when the step is done. Returns
    whether what was saved is the state at the call."""
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    _step(model, optimizer)
    found: dict[str, Any] = {"with": [], "local": []}
    with copying_begins_when() as begin, dcp.Engine() as engine:
        wait = engine.wait_for_staging

        def begin_and_wait(timeout: float | None = None) -> None:
            begin.set()
            wait(timeout)

        engine.wait_for_staging = begin_and_wait  # type: ignore[method-assign]
        handle = engine.install_staging_hook(optimizer)
        for turn in range(3):
            begin.clear()
            expected = _local_parts(_state(model, optimizer))
            response = engine.async_save(
                {"training": _state(model, optimizer)},
                checkpoint_id=f"{path}-{turn}",
                async_checkpointer_type=KINDS[kind],
                background_staging=True,
            )
            assert not response.staging_completion.done()
            _step(model, optimizer)
            response.result(LIMIT)
            found["with"].append(_loaded_parts(f"{path}-{turn}", model, optimizer) == expected)
        handle.remove()

        # What the hook is for: the alarm does not see a fused step on local shards.
        begin.clear()
        expected = _local_parts(_state(model, optimizer))
        response = engine.async_save(
            {"training": _state(model, optimizer)},
            checkpoint_id=f"{path}-torn",
            async_checkpointer_type=KINDS[kind],
            background_staging=True,
        )
        _step(model, optimizer)
        begin.set()
        failed = outcome(response)["kind"]
        found["without"] = failed or (
            "same" if _loaded_parts(f"{path}-torn", model, optimizer) == expected else "torn"
        )
    return found


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        "model": model.state_dict(),
        "optimizer": {names[p]: state for p, state in optimizer.state.items()},
    }


def _local_parts(state: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of every tensor that this rank has, by name."""
    found: dict[str, bytes] = {}
    pending: list[tuple[str, Any]] = list(state.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending.extend((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            local = value.to_local() if hasattr(value, "to_local") else value
            found[name] = local.detach().contiguous().numpy().tobytes()
    return found


def _loaded_parts(
    path: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, bytes]:
    def empty(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: empty(inner) for key, inner in value.items()}
        return torch.zeros_like(value)

    into = empty(_state(model, optimizer))
    dcp.load({"training": into}, checkpoint_id=path)
    return _local_parts(into)


# -- endurance ---------------------------------------------------------------------------------


def save_often(path: str, kind: str, saves: int, settled: int) -> list[dict[str, Any]]:
    """Every third save fails; returns what there is after ``settled`` saves, and in the end."""
    from tests.async_saver.test_endurance import holdings

    store: Any = dist.distributed_c10d._get_default_store()
    found = []
    state = async_cases.content(0.0)
    with dcp.Engine() as engine:
        for turn in range(saves):
            writer: dcp.StorageWriter = dcp.FileSystemWriter(path)
            if turn % 3 == 2 and turn % 2 == dist.get_rank():
                writer = async_cases.FailingWriter(path)
            _fill(state, float(turn))
            response = engine.async_save(
                state, storage_writer=writer, async_checkpointer_type=KINDS[kind], timeout=LIMIT
            )
            assert bool(outcome(response)["failed"]) is (turn % 3 == 2)
            if turn in (settled, saves - 1):
                dist.barrier()
                pids = [os.getpid(), *([] if engine.worker_pid is None else [engine.worker_pid])]
                found.append({"keys": store.num_keys(), "of": [holdings(pid) for pid in pids]})
                dist.barrier()
        assert (saves - 1) % 3 != 2
        assert holds(path, float(saves - 1))
        pid = engine.worker_pid
    if pid is not None:
        wait_until(lambda: gone(pid), "the worker's end")
    return found


def _fill(state: dict[str, Any], value: float) -> None:
    """As ``async_cases.content``; making a mesh anew would leave keys in the store."""
    for name in ("sharded", "replicated", "plain"):
        state[name].fill_(value)
    state["own"].value.fill_(value + dist.get_rank())
    state["step"] = value
