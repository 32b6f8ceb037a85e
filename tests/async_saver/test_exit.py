"""The end of a program that has asynchronous saves under way, or failed ones behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import dcp_engine as dcp
from tests.async_saver.gated import wait_until
from tests.async_saver.test_process import gone

ROOT = Path(__file__).parents[2]

DRAINED = """
import os, sys, torch
import dcp_engine as dcp
from tests.async_saver.gated import Boom, FailingWriter, Gate, GatedWriter

path = sys.argv[1]
failing = dcp.Engine()
response = failing.async_save({"w": torch.ones(9)}, storage_writer=FailingWriter(path + "-failed"))
seen = dcp.Engine()
try:
    seen.async_save({"w": torch.ones(9)}, storage_writer=FailingWriter(path + "-seen")).result()
except dcp.CheckpointException:
    pass
# Nobody closes this one, and it has work for a while.
pending = dcp.Engine(max_pending=2)
for turn in range(2):
    pending.async_save(
        {f"w{i}": torch.full((300, 1000), float(turn)) for i in range(20)},
        storage_writer=dcp.FileSystemWriter(path),
    )
if os.fork() == 0:
    sys.exit(0)  # has no part in its parent's saves
os.wait()
"""


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def test_an_engine_that_nobody_closed(tmp_path: Path) -> None:
    """Its saves are waited for, and the failure that nobody saw is in the log, once."""
    ended = run(DRAINED, tmp_path / "c")
    assert ended.returncode == 0, ended.stderr
    into = {f"w{i}": torch.zeros(300, 1000) for i in range(20)}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert all(w.unique().tolist() == [1] for w in into.values())
    assert ended.stderr.count("an asynchronous save failed") == 1, ended.stderr
    assert "on purpose" in ended.stderr
    assert "nobody looked at it" in ended.stderr


POOLED = """
import sys, threading, time, torch
from concurrent.futures import ThreadPoolExecutor
import dcp_engine as dcp

class Pooled(dcp.FileSystemWriter):
    # Writes by an executor, as many storage libraries do, when the main thread has run to its end.
    def write_columns(self, *args):
        while not threading._SHUTTING_DOWN:
            time.sleep(0.01)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super().write_columns, *args).result()

dcp.Engine().async_save({"w": torch.ones(9)}, storage_writer=Pooled(sys.argv[1]))
"""


def test_executors_work_until_all_is_drained(tmp_path: Path) -> None:
    ended = run(POOLED, tmp_path / "c")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    into = {"w": torch.zeros(9)}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert into["w"].tolist() == [1.0] * 9


LEFT = """
import sys, torch
from pathlib import Path
import dcp_engine as dcp
from tests.async_saver.gated import Gate, GatedWriter

path = sys.argv[1]
process = dcp.AsyncCheckpointerType.PROCESS
engine = dcp.Engine(**{sys.argv[3]: float(sys.argv[4])})
state = {"w": torch.zeros(9)}
engine.async_save(state, checkpoint_id=path, async_checkpointer_type=process).result()
gate = Gate(Path(sys.argv[2]))
writer = GatedWriter(path, gate, "write_columns", after=True)
state["w"] += 1
response = engine.async_save(state, storage_writer=writer, async_checkpointer_type=process)
gate.wait_for_visitor()
print(engine.worker_pid)
"""


@pytest.mark.parametrize("option", ["drain_at_exit", "drain_timeout"])
def test_what_is_not_drained(tmp_path: Path, option: str) -> None:
    """The save in the worker is given up, at once or when the time is up, and that is said."""
    value = {"drain_at_exit": "0", "drain_timeout": "0.3"}[option]
    ended = run(LEFT, tmp_path / "c", tmp_path / "gate", option, value)
    assert ended.returncode == 0, ended.stderr
    assert "1 asynchronous saves were not finished" in ended.stderr
    assert "SIGKILL" in ended.stderr, "the failure of the save is in the log"
    worker = int(ended.stdout)
    wait_until(lambda: gone(worker), "the worker's end")
    into = {"w": torch.ones(9)}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert into["w"].tolist() == [0.0] * 9
    assert os.listdir(tmp_path / "gate") == ["entered"], "it was not let go"
