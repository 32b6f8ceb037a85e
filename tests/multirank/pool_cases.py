"""What the rank processes run in the tests of the pool itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from dcp_engine.executors.process import (
    WorkerContext,
    WorkerProcess,
    WorkerRequest,
    WorkerSettings,
)


def ids() -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), os.getpid()


def pids_here() -> list[int]:
    """Of the rank and of what its workers are forked off."""
    return [os.getpid(), *map(int, _held_here()[1])]


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"boom on {rank}")


def hang_on(rank: int) -> None:
    while dist.get_rank() == rank:
        time.sleep(0.1)


def lose(rank: int, how: str) -> str:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    return "here"


def whole_tensor(rows: int) -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = distribute_tensor(torch.arange(rows), mesh, [Shard(0)]) + 0
    return list(tensor.full_tensor().tolist())


def unreadable() -> object:
    return lambda: None


class Surroundings:
    """The handler of a worker that tells what it finds around itself."""

    def __init__(self, init: bytes, context: WorkerContext) -> None:
        self.parent = context.parent_pid

    def handle(self, request: WorkerRequest) -> bytes:
        ignored = {
            number.name: signal.getsignal(number) == signal.SIG_IGN
            for number in signal.valid_signals()
            if isinstance(number, signal.Signals)
        }
        return json.dumps(
            {
                "a child of its parent": os.getppid() == self.parent,
                "a session of its own": os.getsid(0) == os.getpid(),
                "command line": sys.argv,
                "search path": sys.path,
                # One that a new interpreter may set by itself.
                "environment": {k: v for k, v in os.environ.items() if k != "LC_CTYPE"},
                "directory": os.getcwd(),
                "open": sorted(_kind(name) for name in os.listdir("/proc/self/fd")),
                "standard input": os.readlink("/proc/self/fd/0"),
                "output": [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)],
                "ignored": ignored,
                "threads": sorted(thread.name for thread in threading.enumerate()),
                "main": sys.modules["__main__"].__name__,
            }
        ).encode()

    def close(self) -> None:
        pass


def _kind(descriptor: str) -> str:
    """What is open there; nothing for the directory that is being listed."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").partition(":[")[0]
    except OSError:
        return ""


def worker_surroundings() -> dict[str, Any]:
    """What a worker of this rank tells; how it ends when it is killed, and what is left then."""
    before = _held_here()
    settings = WorkerSettings(
        handler=f"{__name__}:Surroundings", name="told", environment={"TOLD": "yes"}
    )
    worker = WorkerProcess(settings)
    with worker:
        pid = worker.started.result(60)
        found = json.loads(worker.call("tell", timeout=60))
        while_alive = len(_held_here()[1]) - len(before[1])
        os.kill(pid, signal.SIGKILL)
        try:
            worker.call("tell", timeout=60)
        except Exception as error:
            found["end"] = str(error).replace(str(pid), "its pid")
    found["children"] = [while_alive, len(_held_here()[1]) - len(before[1])]
    found["left open"] = sorted(_held_here()[0] - before[0])
    return found


def _held_here() -> tuple[set[str], list[str]]:
    """Descriptors and children of this process."""
    children = [
        child
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return {name for name in os.listdir("/proc/self/fd") if _kind(name)}, children


if __name__ == "__main__":
    # A parent that starts ranks and is killed: `python -m tests.multirank.pool_cases`.
    from tests.multirank.pool import RankPool

    pool = RankPool()
    print(*(pid for of_rank in pool.run(2, pids_here) for pid in of_rank), flush=True)
    child = multiprocessing.active_children()[0].pid
    if child is not None:
        os.kill(child, signal.SIGSTOP)
    sys.stdin.read()
