"""A pool of rank processes that stay alive over many test cases.

Importing torch costs seconds; a process forked off one that has done so, and a new process group,
cost milliseconds. Each case gets a new process group under a prefix of its own, and a deadline.
Ranks are started again only after they died or missed the deadline.

    def shout(word):                                   # importable, at module level
        return word.upper() + str(dist.get_rank())

    def test_shout(ranks):
        assert ranks.run(2, shout, "a") == ["A0", "A1"]
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.multirank import worker_template
from tests.multirank.worker import Case, Reply, serve

__all__ = ["RankPool", "RanksFailed"]

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    # torch looks up the name of each peer, which may take 10 s by default; not so in the pool's own
    # process, whose store answers all ranks.
    "RES_OPTIONS": "timeout:1 attempts:1",
}
_PRELOADED = [
    "torch.distributed.tensor",
    "torch._dynamo",  # the first DTensor.from_local of a process imports it: half a second
    "dcp_engine",
    "storage_backends.filesystem",
    "tests.multirank.worker",
    *worker_template.PRELOADED,
]
_START_LIMIT = 120.0
_STORE_TIMEOUT = timedelta(seconds=60)


class RanksFailed(AssertionError):
    """A case failed on some ranks; the text holds what each of them said."""


class _Rank:
    """One process, and the pipe to it."""

    def __init__(self, logs: Path) -> None:
        self.log = logs / f"rank-{time.monotonic_ns()}.log"
        context = _context()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, str(self.log)), daemon=True)
        with _environment():
            self.process.start()
        theirs.close()
        self.ready = False

    def wait_until_ready(self) -> None:
        if self.ready:
            return
        if not self.pipe.poll(_START_LIMIT) or self.pipe.recv() != "ready":
            raise RanksFailed(f"a rank process did not start\n{_tail(self.log)}")
        self.ready = True

    def kill(self) -> None:
        self.process.kill()  # also ends a stopped process
        self.process.join(10)
        self.pipe.close()


def _context() -> ForkServerContext:
    """A process is forked off one that has done the imports, and no more than that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class RankPool:
    """Made once per test session; see the ``ranks`` fixture."""

    def __init__(self) -> None:
        self._logs = Path(tempfile.mkdtemp(prefix="dcp-engine-ranks-"))
        self._ranks: dict[int, _Rank] = {}
        self._spares: list[_Rank] = []
        self._case = 0
        with _environment():
            self._store = dist.TCPStore(
                "localhost", 0, None, True, timeout=_STORE_TIMEOUT, wait_for_workers=False
            )

    def run(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        expect_kill: Collection[int] = (),
        host_in_rank: int | None = None,
        backend: str = "gloo",
        real_workers: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Run ``fn(*args, **kwargs)`` on every rank of a new process group.

        Args:
            fn: a function at the top level of a module that the ranks can import.
            timeout: seconds for the case on all ranks; those that miss it are killed, and their
                stacks are in the error.
            expect_kill: ranks that are killed, stopped or hang in this case: their result is
                None, and they are ended once all others have answered.
            host_in_rank: this rank hosts the store of the process group; by default the pool
                does, which outlives every rank.
            backend: of the process group.
            real_workers: start worker processes as a job does. By default they are forked off a
                process that has done the imports, which spares seconds and keeps everything but
                the start itself as it is (``worker_template``).

        Returns:
            What ``fn`` returned, by rank.

        Raises:
            RanksFailed: a rank raised, died or missed the deadline.
        """
        members = self._members(world_size)
        self._case += 1
        case = Case(
            number=self._case,
            world_size=world_size,
            module=fn.__module__,
            function=fn.__qualname__,
            arguments=pickle.dumps((args, kwargs)),
            port=self._store.port,
            host_in_rank=host_in_rank,
            backend=backend,
            timeout=timeout,
            real_workers=real_workers,
        )
        for rank, member in enumerate(members):
            member.pipe.send((case, rank))
        replies = self._collect(members, set(expect_kill), time.monotonic() + timeout)
        problems = [
            f"--- rank {rank}: {reply.problem}"
            for rank, reply in enumerate(replies)
            if reply.problem and rank not in expect_kill
        ]
        self._replace(members, replies)
        if problems:
            text = "\n".join(problems)
            raise RanksFailed(f"{fn.__qualname__} failed on {world_size} ranks\n{text}")
        return [reply.value for reply in replies]

    def log(self, rank: int) -> str:
        """What the process that is now this rank wrote to stdout and stderr, in all cases."""
        return self._ranks[rank].log.read_text(errors="replace")

    def close(self) -> None:
        """End all ranks."""
        for rank in [*self._ranks.values(), *self._spares]:
            rank.kill()
        self._ranks.clear()
        self._spares.clear()
        shutil.rmtree(self._logs, ignore_errors=True)

    def _members(self, world_size: int) -> list[_Rank]:
        for slot in range(world_size):
            present = self._ranks.get(slot)
            if present is None or not present.process.is_alive():
                self._ranks[slot] = self._spares.pop() if self._spares else _Rank(self._logs)
        members = [self._ranks[slot] for slot in range(world_size)]
        for member in members:
            member.wait_until_ready()
        return members

    def _collect(self, members: list[_Rank], lost: set[int], deadline: float) -> list[Reply]:
        replies: dict[int, Reply] = {}
        while set(range(len(members))) - lost - set(replies):
            waiting = {
                member.pipe: rank for rank, member in enumerate(members) if rank not in replies
            }
            ready = connection.wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                replies[rank] = self._receive(members[rank])
        for rank, member in enumerate(members):
            if rank not in replies:
                hung = "" if rank in lost else _stacks(member)
                replies[rank] = Reply(value=None, problem=f"no answer in time\n{hung}")
        return [replies[rank] for rank in range(len(members))]

    def _receive(self, member: _Rank) -> Reply:
        try:
            reply = member.pipe.recv()
        except (EOFError, ConnectionError):
            member.process.join(10)
            text = f"died with exit code {member.process.exitcode}\n{_tail(member.log)}"
            return Reply(value=None, problem=text)
        except Exception as error:
            return Reply(value=None, problem=f"its result cannot be read: {error!r}")
        if not isinstance(reply, Reply):
            return Reply(value=None, problem=f"answered {reply!r}")
        return reply

    def _replace(self, members: list[_Rank], replies: list[Reply]) -> None:
        for member, reply in zip(members, replies, strict=True):
            if not reply.usable:
                member.kill()
                # Started now, so that it is there when the next case asks: tests that lose ranks
                # mostly wait for deadlines.
                self._spares.append(_Rank(self._logs))


def _stacks(member: _Rank) -> str:
    """Where a rank hangs: its Python stacks, written by faulthandler."""
    if member.process.pid is None or not member.process.is_alive():
        return ""
    os.kill(member.process.pid, signal.SIGUSR1)
    end = time.monotonic() + 1.0
    while time.monotonic() < end and "most recent call first" not in _tail(member.log):
        time.sleep(0.02)
    time.sleep(0.05)
    return _tail(member.log, 12000)


def _tail(log: Path, limit: int = 4000) -> str:
    return log.read_text(errors="replace")[-limit:] if log.exists() else ""
