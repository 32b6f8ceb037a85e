"""Tensors from rank to rank within one operation: a gloo group of its own.

Why not the job's group: an operation that fails leaves sends and receives behind that nobody
answers. gloo ends such a wait by a timeout only, and a timeout closes the group's connections
(torch 2.13: "Application timeout caused pair closure"), so that one failed load would end the
training job. A group over the session's store is made in some 10 ms, needs no device, leaves the
job's own traffic alone, and can be thrown away.

Belongs here: connecting, waiting without hanging, letting go. Does not belong here: what is sent.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dcp_engine.closing import Closing
from dcp_engine.errors import CoordinationError

__all__ = ["DataGroup", "Transfer"]

Check = Callable[[], None]

_CONNECT_LIMIT = timedelta(seconds=300)
_NO_LIMIT = timedelta(days=30)
"""Waits end by an answer or by a closed connection; deadlines are the caller's ``check``."""
_AT_ONCE = timedelta(milliseconds=1)
_LOOK_S = 0.02
"""Seconds between two looks at ``check`` while waiting."""
_LEAVE_LIMIT_S = 5.0
_ABORT_TAG = 1 << 30


class Transfer(NamedTuple):
    """A send or receive under way; holds its memory."""

    work: Any
    tensor: torch.Tensor
    peer: int


class DataGroup(Closing):
    """The ranks of one operation, connected to each other. A context manager.

    Args:
        store: a c10d store under a prefix that nobody else uses.
        check: called while waiting; what it raises ends the wait.
    """

    def __init__(self, store: Any, *, rank: int, world_size: int, check: Check) -> None:
        self.rank = rank
        self.world_size = world_size
        self._check = check
        self._waits: queue.SimpleQueue[tuple[list[Transfer], Future[None]] | None] = (
            queue.SimpleQueue()
        )
        self._unfinished: dict[int, Transfer] = {}
        """By the identity of their work. Memory that gloo may still write to has to live until
        the connections are closed, whatever became of the caller."""
        self._watched: dict[Future[None], list[Transfer]] = {}
        self._group: Any = None
        self._thread = threading.Thread(
            target=self._run, args=(store,), name="dcp_engine-data", daemon=True
        )
        self._connected: Future[None] = Future()
        self._thread.start()
        try:
            self._await(self._connected)
        except BaseException:
            self._waits.put(None)  # the thread ends when its attempt does
            raise

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> Transfer:
        """Begin to send a contiguous CPU tensor; its memory must stay as it is until waited for."""
        return self._begin("send", tensor, to, tag)

    def receive(self, tensor: torch.Tensor, source: int, tag: int) -> Transfer:
        """Begin to receive into a contiguous CPU tensor of exactly the size that is sent."""
        return self._begin("recv", tensor, source, tag)

    def watch(self, transfers: list[Transfer]) -> Future[None]:
        """What ``finish`` waits for."""
        done: Future[None] = Future()
        self._watched[done] = transfers
        self._waits.put((transfers, done))
        return done

    def finish(self, done: Future[None]) -> None:
        """Wait until all of them are through.

        Raises:
            CoordinationError: kind ``rank_failed``: the connection to a rank broke.
        """
        self._await(done)
        for transfer in self._watched.pop(done, []):
            self._unfinished.pop(id(transfer.work), None)

    def close(self) -> None:
        """Let go of the connections; transfers under way are broken off. May be called twice."""
        group, self._group = self._group, None
        if group is None:
            return
        if self._unfinished:
            _break_off(group, self.rank, self.world_size)
        self._waits.put(None)
        self._thread.join(_LEAVE_LIMIT_S)
        self._watched.clear()
        self._unfinished.clear()

    def _begin(self, call: str, tensor: torch.Tensor, peer: int, tag: int) -> Transfer:
        try:
            work = getattr(self._group, call)([tensor], peer, tag)
        except RuntimeError as error:
            raise _broken(peer, error) from error
        transfer = self._unfinished[id(work)] = Transfer(work, tensor, peer)
        return transfer

    def _await(self, done: Future[None]) -> None:
        while not wait([done], timeout=_LOOK_S).done:
            self._check()
        if done.exception() is not None:
            self._check()  # whoever left may have said why
        done.result()

    def _run(self, store: Any) -> None:
        """Everything that can block, on a thread that nobody has to wait for."""
        try:
            self._group = dist.ProcessGroupGloo(store, self.rank, self.world_size, _CONNECT_LIMIT)
        except BaseException as error:
            self._connected.set_exception(
                CoordinationError(
                    f"the ranks did not connect to each other: {error}",
                    hint="if hosts have several networks, name one in GLOO_SOCKET_IFNAME",
                )
            )
            return
        self._connected.set_result(None)
        while (item := self._waits.get()) is not None:
            transfers, done = item
            try:
                for transfer in transfers:
                    _wait_for(transfer)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)
            del item, transfers, done


def _wait_for(transfer: Transfer) -> None:
    try:
        transfer.work.wait(_NO_LIMIT)
    except RuntimeError as error:
        raise _broken(transfer.peer, error) from error


def _break_off(group: Any, rank: int, world_size: int) -> None:
    """Close the connections by what closes them: a wait that times out. The helper's waits then
    end."""
    for peer in range(world_size):
        if peer == rank:
            continue
        try:
            byte = torch.empty(1, dtype=torch.uint8, device="cpu")
            group.recv([byte], peer, _ABORT_TAG).wait(_AT_ONCE)
        except RuntimeError:  # what is wanted
            continue


def _broken(peer: int, error: Exception) -> CoordinationError:
    return CoordinationError(
        f"the connection to rank {peer} broke while tensors were handed on: {error}",
        kind="rank_failed",
        hint=f"see what became of rank {peer}",
    )
