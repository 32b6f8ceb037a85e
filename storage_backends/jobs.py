"""Independent pieces of work on one rank, one after the other or on several threads.

Belongs here: running jobs, and stopping all when one fails. Does not belong here: what a job does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

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

    def checked() -> None:
        if stop.is_set():
            raise _Stopped
        check()

    def one(job: J) -> None:
        checked()
        run(job, checked)

    with ThreadPoolExecutor(min(threads, len(jobs)), thread_name_prefix="dcp_engine-io") as pool:
        futures: list[Future[None]] = [pool.submit(one, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # No job failed: all are done, and nobody looks at the event any more.
            stop.set()
        wait(futures)
    errors = [error for f in futures if (error := f.exception()) is not None]
    for error in errors:
        if not isinstance(error, _Stopped):
            raise error
