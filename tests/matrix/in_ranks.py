"""What a rank does in a case: fail, look at what is there, save again, count what is left.

Belongs here: the steps of a case on one rank, and what it reports. Does not belong here: judging
the reports (``verdict``).
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

import dcp_engine as dcp
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.rhythm import Rhythm
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.prune import prune
from storage_backends.sharded_reader import ShardedReader
from storage_backends.sharded_writer import ShardedWriter
from tests.matrix.cases import Case
from tests.matrix.sites import Site
from tests.matrix.strike import Strike, StruckStore, mark_done, strike_method, wait_for_blow

__all__ = ["hang_of", "killed", "recover", "survived"]

SLOWNESS = float(os.environ.get("DCP_MATRIX_SLOWNESS", "1"))
"""How many times slower than in a quiet run things may be before that counts as a failure: more
where many groups of ranks share a machine with others."""
QUICK = Rhythm(interval=0.1 * SLOWNESS, grace=0.5 * SLOWNESS, idle_poll=0.02)
DEADLINE = 1.5 * SLOWNESS
"""Seconds for an operation in which a rank hangs."""
WORKER_DEADLINE = 8.0 * SLOWNESS
"""The same where workers save, which give way to everything else."""
STALL = 1.5 * SLOWNESS
"""Seconds of silence that are death here: fifteen heartbeats."""
PATIENCE = 40.0
"""Seconds for everything else: never reached."""

Strikes = dict[str, Strike]
"""By what is struck: the label of a site's own, and ``first``."""


class _Part:
    """A ``Stateful``."""

    def __init__(self, value: float) -> None:
        self.held = torch.full((3,), value)

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held, "name": "part"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = state_dict["held"]


class _State:
    """A sharded tensor, a replicated one, small and large objects, a rank's own, a ``Stateful``:
    all made of one value."""

    def __init__(self, value: float, *, own: bool = True) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.part = _Part(value)
        self.content: dict[str, Any] = {
            "w": DTensor.from_local(torch.full((3, 4), value), mesh, [Shard(0)], run_check=False),
            "bias": torch.full((7,), value),
            "step": value,
            "log": [value] * 2000,
            "part": self.part,
        }
        if own:
            self.content["own"] = dcp.PerRank(torch.full((2,), value + dist.get_rank()))

    def values(self) -> list[float]:
        """What it is made of now."""
        content = self.content
        return sorted(
            {
                *content["w"].to_local().flatten().tolist(),
                *content["bias"].tolist(),
                content["step"],
                *content["log"],
                *((content["own"].value - dist.get_rank()).tolist() if "own" in content else []),
                *self.part.held.tolist(),
            }
        )


class _ItemSavePlanner(dcp.DefaultSavePlanner):
    def finish_plan(self, new_plan: Any) -> Any:
        return super().finish_plan(new_plan)


class _ItemLoadPlanner(dcp.DefaultLoadPlanner):
    def finish_plan(self, central_plan: Any) -> Any:
        return super().finish_plan(central_plan)


# -- one operation, struck ---------------------------------------------------------------------


def _engine() -> dcp.Engine:
    made = dcp.Engine(timeout=PATIENCE, stall_timeout=PATIENCE)
    if dist.get_world_size() > 1:
        made._sessions.use(open_session(rhythm=QUICK))
    return made


def _operate(on: dcp.Engine, case: Case, path: str, value: float, strikes: Strikes) -> None:
    OPERATIONS[case.site.operation](on, case, path, value, strikes)


def _deadline(case: Case) -> float:
    return WORKER_DEADLINE if case.site.operation == "async process" else DEADLINE


def hang_of(case: Case) -> float:
    """Seconds for which the case does nothing but hang."""
    return _deadline(case) if case.fault == "hang" else 0.0


def _options(case: Case) -> dict[str, Any]:
    return {
        "no_dist": case.world_size == 1,
        "coordinator_rank": case.coordinator,
        # A rank that dies before its first word is missed at the deadline only.
        "timeout": _deadline(case)
        if case.fault == "hang" or (case.fault == "kill" and case.site.outside)
        else PATIENCE,
        # Of a worker's death its parent knows without waiting.
        "stall_timeout": STALL if case.dies else PATIENCE,
    }


def _struck_save(on: dcp.Engine, case: Case, path: str, value: float, strikes: Strikes) -> None:
    site = case.site
    state = _State(value, own=site.path == "columns")
    writer = ShardedWriter(partial(_struck_store, site=site, strikes=strikes), path)
    planner = _ItemSavePlanner() if site.path == "items" else dcp.DefaultSavePlanner()
    _strike_objects(site, strikes, writer=writer, planner=planner, stateful=state.part)
    on.save(state.content, storage_writer=writer, planner=planner, **_options(case))


def _struck_load(on: dcp.Engine, case: Case, path: str, value: float, strikes: Strikes) -> None:
    site = case.site
    state = _State(-1.0, own=site.path == "columns")
    reader = ShardedReader(partial(_struck_store, site=site, strikes=strikes), path)
    planner = _ItemLoadPlanner() if site.path == "items" else dcp.DefaultLoadPlanner()
    _strike_objects(site, strikes, reader=reader, planner=planner, stateful=state.part)
    on.load(state.content, storage_reader=reader, planner=planner, **_options(case))


def _struck_async_save(
    on: dcp.Engine, case: Case, path: str, value: float, strikes: Strikes
) -> None:
    site = case.site
    state = _State(value, own=site.path == "columns" and site.subject != "stager")
    writer = ShardedWriter(partial(_struck_store, site=site, strikes=strikes), path)
    planner = _ItemSavePlanner() if site.path == "items" else dcp.DefaultSavePlanner()
    stager = _Stager() if site.subject == "stager" else None
    _strike_objects(
        site, strikes, writer=writer, planner=planner, stateful=state.part, stager=stager
    )
    response = on.async_save(
        state.content,
        storage_writer=writer,
        planner=planner,
        async_checkpointer_type=_EXECUTORS[site.operation],
        async_stager=stager,
        **_options(case),
    )
    response.result(PATIENCE)


class _Stager(dcp.AsyncStager):
    """A stager of another origin."""

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]]:
        staged: Future[dict[str, Any]] = Future()
        staged.set_result(dict(state_dict))
        return staged


_EXECUTORS = {
    "async thread": dcp.AsyncCheckpointerType.THREAD,
    "async process": dcp.AsyncCheckpointerType.PROCESS,
}
OPERATIONS: dict[str, Callable[[dcp.Engine, Case, str, float, Strikes], None]] = {
    "save": _struck_save,
    "load": _struck_load,
    **dict.fromkeys(_EXECUTORS, _struck_async_save),
}


def _plain_store(place: Any) -> FileSystemStore:
    return FileSystemStore(place)


def _struck_store(place: Any, *, site: Site, strikes: Strikes) -> Any:
    store: Any = FileSystemStore(place)
    if site.first.startswith("store."):
        operation = site.first.split()[0].partition(".")[2]
        store = StruckStore(store, operation, site.name, strikes["first"])
    if site.subject == "store":
        store = StruckStore(store, site.method, site.name, strikes["fault"])
    return store


def _strike_objects(site: Site, strikes: Strikes, **objects: Any) -> None:
    if site.first and not site.first.startswith("store."):
        subject, _, method = site.first.split()[0].partition(".")
        strike_method(objects[subject], method, strikes["first"])
    if site.subject != "store":
        strike_method(objects[site.subject], site.method, strikes["fault"])


def _strikes(case: Case, control: str) -> Strikes:
    rank, world = dist.get_rank(), range(case.world_size)
    common: dict[str, Any] = {"control": control, "rank": rank}
    first_when = "after" if case.site.first.endswith(" after") else "before"
    return {
        "fault": Strike(
            label="fault",
            ranks=case.ranks,
            how=case.fault,
            when=case.when,
            nth=case.site.nth,
            together=case.site.together and len(case.ranks) > 1,
            waiters=tuple(r for r in world if r not in case.ranks),
            limit=_deadline(case) + 0.5 if len(case.ranks) == case.world_size else PATIENCE,
            **common,
        ),
        "first": Strike(
            label="first",
            ranks=case.first_ranks if case.site.first else (),
            how="exception",
            when=first_when,
            together=len(case.first_ranks) > 1 if case.site.first else False,
            waiters=(),
            limit=0.0,
            **common,
        ),
    }


def _outcome(run: Callable[[], Any]) -> dict[str, Any]:
    began = time.monotonic()
    raised, kind, ranks, text = "", None, [], ""
    try:
        run()
    except dcp.CheckpointException as error:
        raised, kind, ranks, text = (
            "CheckpointException",
            error.kind,
            sorted(error.failures),
            str(error),
        )
    except BaseException as error:
        raised, text = type(error).__name__, str(error)
    return {
        "raised": raised,
        "kind": kind,
        "ranks": ranks,
        "text": text,
        "seconds": time.monotonic() - began,
    }


def _warm_up(on: dcp.Engine, cases: Sequence[Case], path: str, value: float) -> None:
    """Operations of the kind, so that what the engine keeps for them is there."""
    case = cases[0]
    if case.site.operation not in _EXECUTORS:
        return
    # What another stager has staged is staged once more for a worker, in memory of its own.
    for stager in (None, _Stager()) if any(c.site.subject == "stager" for c in cases) else (None,):
        on.async_save(
            _State(value, own=stager is None).content,
            # Of this module, so that a worker imports it now.
            storage_writer=ShardedWriter(_plain_store, path),
            no_dist=case.world_size == 1,
            async_checkpointer_type=_EXECUTORS[case.site.operation],
            async_stager=stager,
        ).result(PATIENCE)


# -- plain operations --------------------------------------------------------------------------


def _save(on: dcp.Engine, path: str, value: float) -> None:
    on.save(
        _State(value).content,
        storage_writer=dcp.FileSystemWriter(path),
        no_dist=dist.get_world_size() == 1,
    )


def _load(on: dcp.Engine, path: str) -> list[float]:
    state = _State(-1.0, own=False)  # in DCP's life cycle there are no ranks' own values
    on.load(
        state.content,
        storage_reader=dcp.FileSystemReader(path),
        no_dist=dist.get_world_size() == 1,
    )
    return state.values()


def _files(path: str) -> list[str]:
    return sorted(name for name in os.listdir(path))


def _resources() -> dict[str, int]:
    """Descriptors by what they are, threads, and child processes."""
    count: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        count[target.partition(":")[0] if ":" in target else target] += 1
    for thread in threading.enumerate():
        count[f"thread {thread.name.rstrip('0123456789')}"] += 1
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    count["processes"] = len(children.read_text().split()) if children.exists() else 0
    return dict(count)


def _left_over(before: dict[str, int], limit: float = 5.0) -> dict[str, int]:
    """What there is more of than ``before``, once it has had time to go."""
    end = time.monotonic() + limit
    while True:
        now = _resources()
        more = {name: n - before.get(name, 0) for name, n in now.items() if n > before.get(name, 0)}
        if not more or time.monotonic() > end:
            return more
        time.sleep(0.01)


# -- cases -------------------------------------------------------------------------------------


def survived(cases: list[Case], root: str) -> list[dict[str, Any]]:
    """Cases in which no rank dies, one after the other over one engine."""
    place, value = f"{root}/checkpoint", 1.0
    reports = []
    with _engine() as on:
        for _ in range(2):
            _save(on, place, value)
            _load(on, place)
            _warm_up(on, cases, place, value)
        sockets = _resources()["socket"]
        for number, case in enumerate(cases):
            before = _resources()
            if case.site.operation in _EXECUTORS:
                # What failed at the call is told to the others while the next operation runs,
                # over a second connection, which the session keeps.
                before["socket"] = max(before["socket"], sockets + 1)
            report = _struck(on, case, place, value, f"{root}/control-{number}")
            dist.barrier()
            report.update(_aftermath(on, place, value + 2))
            report["left over"] = _left_over(before)
            reports.append(report)
            value += 2
    return reports


def killed(case: Case, root: str) -> dict[str, Any]:
    """A case in which ranks die: what the others see of it."""
    place = f"{root}/checkpoint"
    with _engine() as on:
        _save(on, place, 1.0)
        _warm_up(on, [case], place, 1.0)
        dist.barrier()  # nobody dies, and takes the store along, before all have heard of that
        before = _resources()
        report = _struck(on, case, place, 1.0, f"{root}/control-0")
        report["left over"] = _left_over(before)
    # Who is to die is ended when all others have answered. Of a call that comes when all is over
    # for them, that may be too early.
    wait_for_blow(f"{root}/control-0", "fault", PATIENCE)
    return report


def recover(root: str) -> dict[str, Any]:
    """What other ranks find after ``killed``, in a new job."""
    with _engine() as on:
        return _aftermath(on, f"{root}/checkpoint", 3.0)


def _struck(on: dcp.Engine, case: Case, place: str, value: float, control: str) -> dict[str, Any]:
    Path(control).mkdir(parents=True, exist_ok=True)
    strikes = _strikes(case, control)
    report = _outcome(lambda: _operate(on, case, place, value + 1, strikes))
    mark_done(control, dist.get_rank())
    return {**report, "value": value}


def _aftermath(on: dcp.Engine, place: str, value: float) -> dict[str, Any]:
    """What is there, and whether the next save succeeds."""
    files = _files(place)
    then = _load(on, place)
    _save(on, place, value)
    last = _load(on, place)
    saved = _files(place)  # now the coordinator has removed what it replaced
    pruned = saved
    if len(saved) > 2:
        dist.barrier()  # all ranks have looked
        if dist.get_rank() == 0:
            prune(place, older_than=0)
        dist.barrier()
        pruned = _files(place)
    return {"files": files, "then": then, "saved": saved, "last": last, "pruned": pruned}
