"""How many operations a second a job asks of its store while it writes.

Small jobs are run: W ranks as threads over a store in memory, each operation counted where a rank
hands it to the store's client. Large ones are computed from the rhythm that the same code follows.
Belongs here: both counts. Does not belong here: what the operations are (``coordination``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Target, markdown_table, number
from dcp_engine.coordination.interface import Deadlines, Decision
from dcp_engine.coordination.rhythm import Rhythm
from dcp_engine.coordination.simulated import results_of, run_simulated
from dcp_engine.coordination.store import StoreSession

__all__ = ["run", "table", "targets"]

RUN = (8, 64, 256)
COMPUTED = (1024, 4096, 8192)
WRITE_SECONDS = 10.0
LIMIT = 550.0
"""450 heartbeats, and what else the ranks and the coordinator say."""


def run() -> list[dict[str, Any]]:
    """Count, then compute."""
    return [_counted(size) for size in RUN] + [_computed(size) for size in COMPUTED]


def _counted(world_size: int) -> dict[str, Any]:
    """Half of the ranks write for long, the others have finished and wait."""
    marks = threading.Barrier(world_size)

    def rank(session: StoreSession) -> tuple[int, int]:
        counted: list[int] = []

        def write() -> bytes:
            marks.wait()
            counted.append(session.counters.total)
            end = time.monotonic() + WRITE_SECONDS
            while session.rank % 2 == 0 and time.monotonic() < end:
                operation.check()
                time.sleep(0.1)
            return b""

        def look(_: list[bytes]) -> Decision:
            return Decision()

        with session.begin("save", "x", deadlines=Deadlines()) as operation:
            operation.step("agree", lambda: b"", look)
            operation.step("write", write, look)
            counted.append(session.counters.total)
        return counted[1] - counted[0], session.counters.connections

    results = results_of(run_simulated(world_size, rank, timeout=120.0))
    return {
        "world_size": world_size,
        "operations": sum(count for count, _ in results) / WRITE_SECONDS,
        "connections": max(connections for _, connections in results),
        "interval": Rhythm.for_world(world_size).interval,
        "computed": False,
    }


def _computed(world_size: int) -> dict[str, Any]:
    """One call a rank and interval (a beat, or the coordinator's tick for those that wait). The
    coordinator: two calls a tick, a look each ``idle_poll``, and all pulses in batches of 1,024
    every five seconds."""
    rhythm = Rhythm.for_world(world_size)
    pulses = (1 + -(-world_size // 1024)) / 5
    coordinator = 2 / rhythm.interval + 1 / rhythm.idle_poll + pulses
    return {
        "world_size": world_size,
        "operations": (world_size - 1) / rhythm.interval + coordinator,
        "connections": 1,
        "interval": rhythm.interval,
        "computed": True,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    return markdown_table(
        ("ranks", "seconds between heartbeats", "operations/s", "connections a rank", ""),
        [
            [
                f"{row['world_size']:,}",
                number(row["interval"]),
                number(row["operations"]),
                str(row["connections"]),
                "computed" if row["computed"] else "counted",
            ]
            for row in rows
        ],
    )


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What a job may cost its store."""
    return [
        Target(
            text="store operations a second during a write",
            measured=max(row["operations"] for row in rows),
            limit=LIMIT,
            unit="1/s",
        ),
        Target(
            text="connections a rank",
            measured=max(row["connections"] for row in rows),
            limit=1,
            unit="",
        ),
    ]
