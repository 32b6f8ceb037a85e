"""What runs in a rank process of the pool: one case after the other."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from multiprocessing import connection, forkserver
from typing import Any

from tests.multirank.worker_template import WorkerTemplate

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One function to run, and the process group to run it in."""

    number: int
    world_size: int
    module: str
    function: str
    arguments: bytes
    port: int
    host_in_rank: int | None
    backend: str
    timeout: float
    real_workers: bool


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of a case on one rank."""

    value: Any
    problem: str = ""
    """The traceback, or how the process was lost."""
    usable: bool = False
    """Whether the process can run another case."""


def serve(pipe: Any, log: str) -> None:
    """The life of a rank process. It ends with its parent, even if it is stopped."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _release_fork_server()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    template = WorkerTemplate()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    import torch
    import torch.distributed

    torch.set_num_threads(1)
    # Each case ends with a collection, which is not to go over all of torch each time.
    gc.freeze()
    kept: list[Any] = []
    pipe.send("ready")
    while True:
        try:
            case, rank = pipe.recv()
        except EOFError:
            os._exit(0)
        kept.clear()  # a store that this rank hosted for the others
        with nullcontext() if case.real_workers else template.in_place_of_starts():
            reply = _run(case, rank, kept)
        try:
            data = connection._ForkingPickler.dumps(reply)  # type: ignore[attr-defined]
        except Exception:
            reply = Reply(value=None, problem=traceback.format_exc(), usable=True)
            data = connection._ForkingPickler.dumps(reply)  # type: ignore[attr-defined]
        pipe.send_bytes(data)


def _release_fork_server() -> None:
    """Every process of a fork server holds it alive, a stopped one too. It is to end with the test
    process, and all of its processes with it."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
        server._forkserver_address = None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _run(case: Case, rank: int, kept: list[Any]) -> Reply:
    try:
        _join(case, rank, kept)
        try:
            function = reduce(
                getattr, case.function.split("."), importlib.import_module(case.module)
            )
            args, kwargs = pickle.loads(case.arguments)
            return Reply(value=function(*args, **kwargs), usable=True)
        finally:
            _leave()
    except BaseException:
        return Reply(value=None, problem=traceback.format_exc(), usable=True)


def _join(case: Case, rank: int, kept: list[Any]) -> None:
    import torch.distributed as dist

    if case.backend == "fake":
        importlib.import_module("torch.testing._internal.distributed.fake_pg")
    timeout = timedelta(seconds=case.timeout)
    base = dist.TCPStore(
        "localhost", case.port, None, False, timeout=timeout, wait_for_workers=False
    )
    store: Any = dist.PrefixStore(f"case{case.number}", base)
    if case.host_in_rank is not None:
        if rank == case.host_in_rank:
            base = dist.TCPStore(
                "localhost", 0, None, True, timeout=timeout, wait_for_workers=False
            )
            store.set("port", str(base.port))
            kept.append(base)
        else:
            base = dist.TCPStore("localhost", int(store.get("port")), None, False, timeout=timeout)
        store = base
    dist.init_process_group(
        case.backend, store=store, rank=rank, world_size=case.world_size, timeout=timeout
    )
    # gloo breaks if a rank leaves while others still connect
    if store.add("connected", 1) == case.world_size:
        store.set("all connected", "")
    store.wait(["all connected"], timeout)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        if not hasattr(dist.Store, "clone"):
            # torch 2.6: gloo's threads need the interpreter's lock to let go of the tensors of a
            # collective, torch holds it while it waits for them, and nothing says when they have.
            time.sleep(0.01)
        dist.destroy_process_group()
    # Cached shardings hold the meshes, and so the groups, of this case.
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor, debug

        clear = getattr(debug, "_clear_sharding_prop_cache", None)
        if clear is None:  # torch 2.8 and before
            propagator: Any = DTensor._op_dispatcher.sharding_propagator
            clear = propagator.propagate_op_sharding.cache.cache_clear
        clear()
    gc.collect()
