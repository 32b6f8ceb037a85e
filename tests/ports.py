"""A port for whoever has to be told one beforehand."""

from __future__ import annotations

import os
import random
import socket
from contextlib import closing
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 15000


def free_port() -> int:
    """A port of the loopback interface that nobody listens on.

    It lies below those that the system gives to outgoing connections: one of them could take it
    before its server does, and who knocks at such a port until somebody opens can even be connected
    with himself (TCP's simultaneous open).
    """
    end = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32768
    # Not the seeded generator of the tests: two workers would try the same ones.
    ports = random.Random(os.urandom(8)).sample(range(_LOWEST, max(end, _LOWEST + 5000)), 200)
    for port in ports:
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"none of {len(ports)} ports from {_LOWEST} up is free")
