"""What ranks do in the tests of parents that are killed while their workers save."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import dcp_engine as dcp
from dcp_engine.staging.copier import Copier
from tests.async_saver.gated import Gate, GatedWriter, wait_until
from tests.async_saver.test_process import gone, shared_memory_of
from tests.multirank import async_cases

STALL = 3.0
LIMIT = 4.0
"""Seconds for a save of which a rank never says a word: only the deadline misses that one."""
OLD, NEW, NEXT = 1.0, 2.0, 3.0

POINTS = ("start", "staging", "planning", "writing", "commit", "committed")


class GatedPlanner(dcp.DefaultSavePlanner):
    """Waits where its worker plans."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def create_local_plan(self) -> dcp.SavePlan:
        self.gate.stop_here()
        return super().create_local_plan()


def die() -> NoReturn:
    """As if the node had run out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still here")


def die_while_copying(*args: Any, **kwargs: Any) -> NoReturn:
    """In the place of ``Copier.copy``."""
    die()


def save_old(path: str) -> None:
    """A checkpoint that the next one replaces."""
    dcp.save(_content(OLD), checkpoint_id=path)


def lose_parents(path: str, notes: str, victims: list[int], point: str) -> dict[str, Any]:
    """Save over what is there, and end with SIGKILL on some ranks. Returns what came of it on the
    others; the victims leave their workers' numbers in ``notes``."""
    rank = dist.get_rank()
    engine = dcp.Engine(stall_timeout=STALL)
    if point != "start":
        engine.warmup(_content(NEW))
    gate = Gate(Path(notes) / f"gate-{rank}")
    options = _held(point, path, gate, rank, victims)
    options["timeout"] = LIMIT if point in ("start", "staging") else async_cases.LIMIT
    if rank in victims and point == "staging":
        Copier.copy = die_while_copying  # type: ignore[method-assign]
        leave_word(engine, notes)
    response = save(engine, path, NEW, **options)
    if rank in victims:
        if "storage_writer" in options or "planner" in options:
            gate.wait_for_visitor()
        elif point == "committed":  # held up is the coordinator
            other = Path(notes) / "gate-0" / "entered"
            wait_until(other.exists, "the coordinator's commit")
        leave_word(engine, notes)
        die()
    if point == "committed":
        [victim] = victims
        wait_until(lambda: gone(processes_of(notes, victim)[1]), "the end of the other worker")
        gate.open()
    found = async_cases.outcome(response)
    found["next"] = _alone(engine, f"{path}-alone")
    engine.close()
    return found


def save(engine: dcp.Engine, path: str, value: float, **options: Any) -> dcp.AsyncSaveResponse:
    """As ``async_cases.save``, without what custom planners do not know."""
    if "storage_writer" not in options:
        options["checkpoint_id"] = path
    state = _content(value)
    dist.barrier()
    process = dcp.AsyncCheckpointerType.PROCESS
    response = engine.async_save(state, async_checkpointer_type=process, **options)
    async_cases.spoil(state)
    return response


def look_and_go_on(path: str) -> list[float]:
    """What a new job finds there: the values that are stored whole. Then it saves over it."""
    found = [value for value in (OLD, NEW) if _holds(path, value)]
    dcp.save(_content(NEXT), checkpoint_id=path)
    assert _holds(path, NEXT)
    return found


def leave_word(engine: dcp.Engine, notes: str) -> None:
    """Which process this is, and which the worker; while both live, nothing is in /dev/shm."""
    assert engine.worker_pid is not None
    assert not shared_memory_of(os.getpid(), engine.worker_pid)
    note = Path(notes) / f"worker-{dist.get_rank()}.part"
    note.write_text(f"{os.getpid()} {engine.worker_pid}")
    note.rename(note.with_suffix(""))


def processes_of(notes: str, victim: int) -> tuple[int, int]:
    """Waits for that word."""
    note = Path(notes) / f"worker-{victim}"
    wait_until(note.exists, "the victim's word")
    parent, worker = map(int, note.read_text().split())
    return parent, worker


def _held(point: str, path: str, gate: Gate, rank: int, victims: list[int]) -> dict[str, Any]:
    if point == "planning" and rank in victims:
        return {"planner": GatedPlanner(gate)}
    if point == "planning":
        return {"planner": NamedPlanner()}
    if point == "writing" and rank in victims:
        return {"storage_writer": GatedWriter(path, gate, "write_columns", after=True)}
    if point == "commit" and rank in victims:
        return {"storage_writer": GatedWriter(path, gate, "commit_columns")}
    if point == "committed" and rank == 0:
        return {"storage_writer": GatedWriter(path, gate, "commit_columns", after=victims == [0])}
    return {}


class NamedPlanner(dcp.DefaultSavePlanner):
    """Has an override, so that both ranks go the way of custom planners."""

    def create_local_plan(self) -> dcp.SavePlan:
        return super().create_local_plan()


def _content(value: float) -> dict[str, Any]:
    state = async_cases.content(value)
    del state["own"]
    return state


def _holds(path: str, value: float) -> bool:
    state = _content(-5.0)
    dcp.load(state, checkpoint_id=path)
    return state["step"] == value and all(
        state[name].full_tensor().unique().tolist() == [value] for name in ("sharded", "replicated")
    )


def _alone(engine: dcp.Engine, path: str) -> bool:
    """The survivor's worker is of further use."""
    engine.async_save(
        {"w": torch.ones(9)},
        checkpoint_id=path,
        no_dist=True,
        async_checkpointer_type=dcp.AsyncCheckpointerType.PROCESS,
    ).result(async_cases.LIMIT)
    return True
