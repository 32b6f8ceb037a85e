"""Workers of several ranks, and their process group."""

from __future__ import annotations

import os
import pickle
import signal
from typing import Any

import torch
import torch.distributed as dist

from dcp_engine.coordination.interface import Deadlines, Decision, SessionHandle
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.store import StoreSession
from dcp_engine.errors import CheckpointError
from dcp_engine.executors.process import (
    WorkerContext,
    WorkerProcess,
    WorkerRequest,
    WorkerSettings,
)
from dcp_engine.executors.process.group import WorkerGroup

LIMIT = 60.0


# -- in the worker -----------------------------------------------------------------------------


class GroupHandler:
    """Adds up over the workers of all ranks, and takes part in operations."""

    def __init__(self, init: bytes, context: WorkerContext) -> None:
        self.groups: dict[str, WorkerGroup] = {}

    def handle(self, request: WorkerRequest) -> bytes:
        handle, *arguments = pickle.loads(request.body)
        return pickle.dumps(getattr(self, request.kind)(handle, *arguments))

    def add(self, handle: SessionHandle, generation: int, value: int) -> Any:
        name = getattr(handle, "name", "")
        for other in [other for other in self.groups if other != name]:
            self.groups.pop(other).close()
        group = self.groups.setdefault(name, WorkerGroup(handle, timeout=LIMIT))
        group.ensure(generation)
        total = torch.tensor([value])
        dist.all_reduce(total)
        return int(total), dist.get_backend(), group.generation

    def again(self, handle: SessionHandle, generation: int) -> str:
        """A group that cannot be had."""
        try:
            self.groups[getattr(handle, "name", "")].ensure(generation)
        except CheckpointError as error:
            return str(error)
        return "no error"

    def step(self, handle: SessionHandle, number: int) -> bytes:
        with handle.attach() as session:
            assert session.identity.pid == os.getpid()
            deadlines = Deadlines(timeout=LIMIT)
            with session.begin("save", "c", deadlines=deadlines, number=number) as operation:
                text = str(session.rank).encode()
                common, _ = operation.step(
                    "s", lambda: text, lambda got: Decision(common=b"".join(got))
                )
        return common

    def close(self) -> None:
        for group in self.groups.values():
            group.close()


def make_handler(init: bytes, context: WorkerContext) -> GroupHandler:
    return GroupHandler(init, context)


# -- on the ranks ------------------------------------------------------------------------------


def new_worker() -> WorkerProcess:
    worker = WorkerProcess(
        WorkerSettings(handler=f"{__name__}:make_handler", name="group", rank=dist.get_rank())
    )
    worker.start()
    return worker


def ask(worker: WorkerProcess, kind: str, *arguments: Any) -> Any:
    return pickle.loads(worker.call(kind, pickle.dumps(arguments), timeout=LIMIT))


def generations(path: str) -> dict[str, Any]:
    """Two generations, of which the first one loses a worker, then another session."""
    assert "MASTER_ADDR" not in os.environ
    rank = dist.get_rank()
    seen: dict[str, Any] = {}
    worker = new_worker()
    try:
        with open_session(connect_timeout=LIMIT) as session:
            handle = session.handle()
            seen["step"] = ask(worker, "step", handle, session.take_number())
            seen["first"] = ask(worker, "add", handle, 1, rank + 1)
            if rank == 1:
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGKILL)
            try:
                ask(worker, "add", handle, 1, rank + 1)
            except Exception as error:
                seen["lost"] = type(error).__name__
            if rank == 1:
                worker.close()
                worker = new_worker()
            seen["second"] = ask(worker, "add", handle, 2, 10 * (rank + 1))
            seen["past"] = ask(worker, "again", handle, 1)
            # The parents' own traffic goes on beside it.
            total = torch.tensor([rank + 1])
            dist.all_reduce(total)
            seen["parents"] = int(total)
        seen["file"] = _over_file_store(worker, path)
    finally:
        worker.close()
    return seen


def _over_file_store(worker: WorkerProcess, path: str) -> Any:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    with open_session(connect_timeout=LIMIT) as session:
        assert isinstance(session, StoreSession)
        assert session.address.path == path
        answer = ask(worker, "add", session.handle(), 1, rank + 1)
        dist.barrier()
    return answer
