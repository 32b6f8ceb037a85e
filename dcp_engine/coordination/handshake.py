"""How the ranks of a group agree on a session.

Belongs here: the handshake, over a client of each rank. Does not belong here: what a session does.

Each rank publishes a random nonce and waits for the welcome that carries this nonce in its name;
rank 0 of the group, the leader, welcomes every nonce it finds with the name of the session that it
has drawn, until all ranks have joined. What an earlier run left in the store can therefore make
the leader welcome somebody who is not there, but cannot let anybody in. No rank but the leader
polls.
"""

from __future__ import annotations

import secrets
import time

import msgspec

from dcp_engine.coordination.keys import HandshakeKeys
from dcp_engine.coordination.store_client import StoreClient, WaitTimeout
from dcp_engine.errors import CoordinationError

__all__ = ["agree_on_session"]

_POLL_MIN = 0.001
_POLL_MAX = 0.1
_GO = b"+"
"""The leader's verdict when all have come; any other is a message."""
_NOBODY = b"-"
"""In the place of the session's name, where a rank has waited in vain."""


class _Hello(msgspec.Struct, frozen=True, array_like=True):
    nonce: str
    world_size: int
    host: str


def agree_on_session(
    client: StoreClient,
    prefix: str,
    *,
    rank: int,
    world_size: int,
    host: str,
    timeout: float,
) -> str:
    """Return the name of the session, 16 hexadecimal digits, the same on all ranks.

    Raises:
        CoordinationError: kind ``timeout`` naming the ranks that did not come, or ``store_lost``.
    """
    keys = HandshakeKeys(prefix)
    if rank == 0:
        return _lead(client, keys, world_size, time.monotonic() + timeout, timeout)
    return _follow(client, keys, rank, world_size, host, timeout)


def _lead(
    client: StoreClient, keys: HandshakeKeys, world_size: int, deadline: float, timeout: float
) -> str:
    session = secrets.token_hex(8)
    welcomed: set[str] = set()
    waiting = {keys.hello(rank): rank for rank in range(1, world_size)}
    client.add(keys.joined(session), 0)
    began = time.monotonic()
    others: dict[int, int] = {}
    while client.add(keys.joined(session), 0) < world_size - 1:
        others = _welcome(client, keys, session, waiting, welcomed, world_size)
        if time.monotonic() >= deadline:
            break
        pause = min(max((time.monotonic() - began) / 10, _POLL_MIN), _POLL_MAX)
        time.sleep(min(pause, max(deadline - time.monotonic(), 0)))
    else:
        client.set(keys.go(session), _GO)
        return session
    missing = [rank for key, rank in waiting.items() if not client.check([key])]
    names = ", ".join(map(str, missing[:32])) + (", ..." if len(missing) > 32 else "")
    who = f"missing ranks [{names}]" if missing else "some ranks left only what an earlier run said"
    if others:
        rank, size = min(others.items())
        who += f" (rank {rank} takes the group for one of {size} ranks, not {world_size})"
    error = CoordinationError(
        f"{who} in the handshake of the session after {timeout:.3g} s",
        kind="timeout",
        hint="every rank of the process group has to take part; pass the group that does",
    )
    client.set(keys.go(session), error.message.encode())
    raise error


def _welcome(
    client: StoreClient,
    keys: HandshakeKeys,
    session: str,
    waiting: dict[str, int],
    welcomed: set[str],
    world_size: int,
) -> dict[int, int]:
    """Welcome whoever is there and was not welcomed yet.

    Returns:
        Ranks that have another idea of the world size, and which.
    """
    if client.check(list(waiting)):
        present = list(waiting)
    elif len(waiting) <= 64:
        present = [key for key in waiting if client.check([key])]
    else:
        return {}  # with many ranks, wait for all rather than ask for each
    try:
        said = dict(zip(present, client.multi_get(present), strict=True))
    except WaitTimeout:
        return {}  # a key of an earlier run was removed meanwhile
    others: dict[int, int] = {}
    fresh: list[str] = []
    for key, data in said.items():
        try:
            hello = msgspec.msgpack.decode(data, type=_Hello)
        except msgspec.DecodeError:
            continue  # left by another version of the engine
        if hello.world_size != world_size:
            others[waiting[key]] = hello.world_size
        elif hello.nonce not in welcomed:
            fresh.append(hello.nonce)
    client.multi_set({keys.welcome(nonce): session.encode() for nonce in fresh})
    welcomed.update(fresh)
    return others


def _follow(
    client: StoreClient,
    keys: HandshakeKeys,
    rank: int,
    world_size: int,
    host: str,
    timeout: float,
) -> str:
    nonce = secrets.token_hex(16)
    deadline = time.monotonic() + timeout
    hello = _Hello(nonce=nonce, world_size=world_size, host=host)
    client.set(keys.hello(rank), msgspec.msgpack.encode(hello))
    unwelcome = CoordinationError(
        f"rank {rank} was not welcomed by rank 0 within {timeout:.3g} s",
        kind="timeout",
        rank=rank,
        hint="every rank of the process group has to take part; pass the group that does",
    )
    welcome = keys.welcome(nonce)
    try:
        name = client.get(welcome, timeout, lambda other: other.compare_set(welcome, _NOBODY))
        client.delete(welcome)
        if name == _NOBODY:
            raise unwelcome
        session = name.decode()
        client.add(keys.joined(session), 1)
        # The leader gives its verdict by its own deadline, which began later than this one
        # if it came later.
        go = keys.go(session)
        silence = f"rank 0 gave no verdict on the handshake of the session to rank {rank}"
        verdict = client.get(
            go,
            deadline - time.monotonic() + timeout,
            lambda other: other.compare_set(go, silence.encode()),
        )
    except WaitTimeout:
        raise unwelcome from None
    client.delete(keys.hello(rank))
    if client.add(keys.joined(session), 1) == 2 * (world_size - 1):
        client.delete(keys.joined(session))
        client.delete(keys.go(session))
    if verdict != _GO:
        raise CoordinationError(verdict.decode(), kind="timeout", rank=rank)
    return session
