"""Many asynchronous saves in a process that has done nothing else: ``python -m`` this, with the
kind of save and a directory; prints what it and its worker held, early and late, as JSON.

In the process of the other tests, what those left behind moved its memory by some MiB.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import dcp_engine as dcp
from tests.async_saver.states import assert_holds, every_kind

SAVES = 200
SETTLED = 80
"""Saves until every cache is full."""
WINDOW = 30
"""Saves of which the one with the least memory counts: what the allocator holds back for the next
goes up and down by some MiB."""
LIMIT = 60


def holdings(pid: int) -> dict[str, int]:
    """Descriptors, threads, and bytes of memory of its own."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
        "own": int(fields["RssAnon"].split()[0]) * 1024,
        "shared": int(fields["RssShmem"].split()[0]) * 1024,
    }


def processes(engine: dcp.Engine) -> list[int]:
    return [os.getpid(), *([] if engine.worker_pid is None else [engine.worker_pid])]


def least(turns: list[list[dict[str, int]]]) -> list[dict[str, int]]:
    """Of each process, the least of everything."""
    return [
        {name: min(turn[name] for turn in own) for name in own[0]}
        for own in zip(*turns, strict=True)
    ]


def main(kind: dcp.AsyncCheckpointerType, root: Path) -> dict[str, Any]:
    """Overwriting two checkpoints in turn; objects change their size."""
    before: list[list[dict[str, int]]] = []
    after: list[list[dict[str, int]]] = []
    with dcp.Engine() as engine:
        for turn in range(SAVES):
            state: dict[str, Any] = every_kind(turn)
            state["turns"] = list(range(turn % 7))
            engine.async_save(
                state, checkpoint_id=root / str(turn % 2), async_checkpointer_type=kind
            ).result(LIMIT)
            if SETTLED - WINDOW <= turn < SETTLED:
                before.append([holdings(pid) for pid in processes(engine)])
            if turn >= SAVES - WINDOW:
                after.append([holdings(pid) for pid in processes(engine)])
        assert engine._async is not None
        responses = len(engine._async._responses)
    assert len(before) == len(after) == WINDOW
    assert_holds(root / "1", SAVES - 1)
    return {"early": least(before), "late": least(after), "responses": responses}


if __name__ == "__main__":
    print(json.dumps(main(dcp.AsyncCheckpointerType(sys.argv[1]), Path(sys.argv[2]))))
