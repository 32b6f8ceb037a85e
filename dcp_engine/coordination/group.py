"""From a process group to what a session needs.

Belongs here: everything that knows about ``torch.distributed``'s process groups and how their
store is found, copied and named. Does not belong here: talking over it.

The store is used whatever backend the group has: a group with NCCL alone coordinates without GPU
memory and without a second group.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dcp_engine.coordination.address import StoreAddress, address_of, connect, lost_store
from dcp_engine.coordination.keys import STORE_NAME
from dcp_engine.coordination.store_client import KeyValueStore
from dcp_engine.errors import UsageError

__all__ = [
    "GroupInfo",
    "StoreAccess",
    "describe_group",
    "has_cpu_backend",
    "store_access",
]

_stores: Any = dist
"""The store classes, which torch's type stubs know only in part."""


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """A process group as this rank sees it."""

    rank: int
    """In the group."""
    world_size: int
    name: str
    """The same on all ranks of the group, and no other group's."""
    global_ranks: tuple[int, ...]
    """By rank in the group."""


@dataclass(frozen=True, kw_only=True)
class StoreAccess:
    """A store, and how to get connections of one's own to it."""

    connect: Callable[[], KeyValueStore]
    """A connection, with the job's own prefix: two jobs may share a store."""
    address: StoreAddress

    @property
    def location(self) -> str:
        """For messages."""
        return "this process's memory" if self.address.kind == "memory" else str(self.address)


def describe_group(process_group: dist.ProcessGroup | None) -> GroupInfo:
    """Rank, size and name of the group; None is the default group.

    Raises:
        UsageError: there is no default group, or this process is not in the group.
    """
    if not dist.is_initialized():
        raise UsageError(
            "torch.distributed is not initialized",
            hint="call init_process_group first, or pass no_dist=True",
        )
    group = c10d._get_default_group() if process_group is None else process_group
    if not isinstance(group, dist.ProcessGroup):
        # new_group returns GroupMember.NON_GROUP_MEMBER, which is an int, to the others
        raise UsageError(
            "this process is not in the process group that was passed",
            hint="call save and load on the members of the group only",
        )
    try:
        rank = dist.get_rank(group)
        ranks = dist.get_process_group_ranks(group)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"the process group cannot be used: {error}", hint="was it destroyed?"
        ) from error
    if rank < 0:
        raise UsageError(
            "this process is not in the process group that was passed",
            hint="call save and load on the members of the group only",
        )
    members = "" if len(ranks) == dist.get_world_size() else "+".join(map(str, ranks[:8]))
    return GroupInfo(
        rank=rank,
        world_size=len(ranks),
        # Names of groups may repeat where groups are made by some ranks only: add the members.
        name="-".join(part for part in (_group_name(group), members) if part),
        global_ranks=tuple(ranks),
    )


def _group_name(group: dist.ProcessGroup) -> str:
    return str(group.group_name) or "group"


def store_access(process_group: dist.ProcessGroup | None) -> StoreAccess | None:
    """The store over which the job came together, or None if it cannot be reached.

    Every rank of the group gets the same answer. A ``FakeStore`` is no store.
    """
    try:
        # The default group's store, for subgroups too: their own is a prefix of it, and the
        # name of the group is in our keys.
        store = c10d._get_default_store()
    except ValueError:
        return None
    address = address_of(store)
    if address is None:
        return None
    if address.kind == "memory":
        return StoreAccess(connect=lambda: _OneForAll(store), address=address)
    return StoreAccess(connect=_connections(store, address), address=address)


def _connections(store: Any, address: StoreAddress) -> Callable[[], KeyValueStore]:
    """Opens connections that see the keys of ``store``'s prefixes, or keys like them, and no
    others."""
    clone = getattr(store, "clone", None)
    if clone is not None:
        return cast(Callable[[], KeyValueStore], clone)
    # torch 2.6 copies no store, and nobody can ask a PrefixStore for its prefix. A name that the
    # ranks agree on under these prefixes stands for them; nobody waits for that.
    name = functools.cache(lambda: _agreed_name(store, address))
    return lambda: cast(KeyValueStore, _stores.PrefixStore(name(), connect(address, 300.0)))


def _agreed_name(store: Any, address: StoreAddress) -> str:
    try:
        return bytes(store.compare_set(STORE_NAME, "", uuid.uuid4().hex)).decode()
    except RuntimeError as error:  # all errors of c10d stores are
        raise lost_store(address, error) from None


class _OneForAll:
    """A store that several threads of the process share, and that therefore may not be given a
    timeout for one of them."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._timeout = timedelta(seconds=300)

    def set_timeout(self, timeout: timedelta, /) -> None:
        self._timeout = timeout

    def set(self, key: str, value: bytes, /) -> None:
        self._store.set(key, value)

    def get(self, key: str, /) -> bytes:
        self._store.wait([key], self._timeout)
        return bytes(self._store.get(key))

    def add(self, key: str, amount: int, /) -> int:
        return int(self._store.add(key, amount))

    def check(self, keys: list[str], /) -> bool:
        return bool(self._store.check(keys))

    def compare_set(self, key: str, expected: bytes, desired: bytes, /) -> bytes:
        return bytes(self._store.compare_set(key, expected, desired))

    def delete_key(self, key: str, /) -> bool:
        return bool(self._store.delete_key(key))

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        self._store.wait(keys, self._timeout)
        return [bytes(value) for value in self._store.multi_get(keys)]

    def multi_set(self, keys: list[str], values: list[bytes], /) -> None:
        self._store.multi_set(keys, values)


def has_cpu_backend(process_group: dist.ProcessGroup | None) -> bool:
    """Whether object collectives can run without a device."""
    return dist.get_backend(process_group) in ("gloo", "mpi", "ucc") or "cpu:gloo" in str(
        dist.get_backend_config(process_group)
    )
