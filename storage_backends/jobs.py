"""Independent pieces of work on one rank, one after the other or on several threads.

Belongs here: running jobs, and stopping all when one fails. Does not belong here: what a job does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from dcp_engine.storage import Check

__all__ = ["default_threads", "run_jobs"]

J = TypeVar("J")

MAX_DEFAULT_THREADS = 8
"""More than a disk or a page cache gains from, for one rank."""


def default_threads() -> int:
    """How many threads read or write for one rank, unless somebody says: the processors that this
    process may use, shared with the other ranks of the host as far as the launcher told
    (``LOCAL_WORLD_SIZE``)."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = len(os.sched_getaffinity(0)) // max(1, int(ranks) if ranks.isdigit() else 1)
    return max(1, min(share, MAX_DEFAULT_THREADS))


_NONE: Any = object()


class _Stopped(Exception):
    """Another job failed; this one was told to stop."""


def run_jobs(
    jobs: Iterable[J], run: Callable[[J, Check], None], *, threads: int, check: Check
) -> None:
    """Call ``run(job, check)`` for every job. With several threads the jobs overlap; the first
    failure stops the others at their next ``check`` and is raised when all have ended."""
    jobs = list(jobs)
    if threads <= 1 or len(jobs) <= 1:
        for job in jobs:
            run(job, check)
        return
    stop = threading.Event()
    lock = threading.Lock()
    waiting = iter(jobs)
    errors: list[BaseException] = []

    def checked() -> None:
        if stop.is_set():
            raise _Stopped
        check()

    def work() -> None:
        while True:
            with lock:
                job = next(waiting, _NONE)
            if job is _NONE:
                return
            try:
                checked()
                run(job, checked)
            except _Stopped:
                return
            except BaseException as error:
                errors.append(error)
                stop.set()
                return

    # No ThreadPoolExecutor: at exit it takes nothing more, while pending saves are still drained.
    workers = [
        threading.Thread(target=work, name=f"dcp_engine-io-{number}", daemon=True)
        for number in range(min(threads, len(jobs)))
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        stop.set()  # an interrupt of this thread ends the others too
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    if errors:
        raise errors[0]
