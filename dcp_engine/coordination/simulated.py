"""Many ranks in one process: threads over an in-memory store.

Belongs here: what tests and scale studies need to run real sessions without processes. Nothing in
the engine uses it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from dcp_engine.coordination.interface import RunIdentity
from dcp_engine.coordination.memory_store import MemoryStore
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.store import StoreSession

__all__ = ["results_of", "run_simulated", "simulated_identity"]

_Result = TypeVar("_Result")


def simulated_identity(group: str = "simulated") -> RunIdentity:
    """Who this process is, for sessions without a process group."""
    return RunIdentity(
        run_id="",
        restart_count=0,
        group=group,
        host=socket.gethostname(),
        boot_id="",
        pid=os.getpid(),
    )


def run_simulated(
    world_size: int,
    fn: Callable[[StoreSession], _Result],
    *,
    rhythm: Rhythm | None = None,
    timeout: float = 60.0,
    store: MemoryStore | None = None,
    group: str = "simulated",
) -> list[_Result | BaseException]:
    """Run ``fn(session)`` on ``world_size`` ranks, each a thread with a session of its own.

    Args:
        fn: called once per rank; ``session.rank`` tells which.
        timeout: seconds for all of it, the handshake included.
        store: what they share, by default a new in-memory store.

    Returns:
        By rank, what ``fn`` returned or the exception that it raised. A rank that did not finish
        in time has a ``TimeoutError``; its thread is left behind.
    """
    shared = store if store is not None else MemoryStore()
    identity = simulated_identity(group)
    futures: list[Future[_Result]] = [Future() for _ in range(world_size)]

    def run(rank: int) -> None:
        try:
            session = StoreSession.open(
                shared.clone,
                location="memory",
                rank=rank,
                world_size=world_size,
                identity=identity,
                timeout=timeout,
                rhythm=rhythm,
            )
            with session:
                futures[rank].set_result(fn(session))
        except BaseException as error:
            futures[rank].set_exception(error)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True)
        for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    outcomes: list[_Result | BaseException] = []
    for rank, future in enumerate(futures):
        if not future.done():
            outcomes.append(TimeoutError(f"rank {rank} not finished within {timeout:.3g} s"))
            continue
        error = future.exception()
        outcomes.append(error if error is not None else future.result())
    return outcomes


def results_of(outcomes: Sequence[_Result | BaseException]) -> list[_Result]:
    """The results, if no rank raised; else the first rank's exception is raised."""
    results: list[_Result] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results
