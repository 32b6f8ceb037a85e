"""A fork of a process that has engines: theirs are its parent's, and it makes its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import dcp_engine as dcp

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, signal, sys, torch
import dcp_engine as dcp
from dcp_engine.engine import default
from tests.async_saver.states import held_writer

path = sys.argv[1]
state = {"w": torch.ones(9)}
engine, unused, inherited = dcp.Engine(), dcp.Engine(), dcp.default_engine()
dcp.async_save(state, checkpoint_id=path + "/before").result()
writer, entered, released = held_writer(path + "/pending")
pending = engine.async_save(state, storage_writer=writer)
entered.wait()
default._lock.acquire()  # as by a thread that the fork does not have
child = os.fork()
if child == 0:
    signal.alarm(30)

    def refused(call, *args, **options):
        try:
            call(*args, **options)
        except dcp.UsageError as error:
            return f"process {os.getppid()}, of which this one is a fork" in str(error)

    place = {"checkpoint_id": path + "/never"}
    for call in (engine.save, engine.async_save, engine.load):
        assert refused(call, {"w": torch.ones(9)}, **place), call
        assert refused(call, {"w": torch.ones(9)}, no_dist=True, **place), call
    assert refused(engine.warmup, state)
    assert refused(engine.wait_for_staging)
    assert refused(engine.clear_plan_cache)
    with engine:
        pass
    engine.close()

    with unused:
        unused.async_save(state, checkpoint_id=path + "/unused").result()
    assert dcp.default_engine() is not inherited
    assert dcp.default_engine() is dcp.default_engine()
    dcp.load(state, checkpoint_id=path + "/before")
    dcp.save({"w": state["w"] + 1}, checkpoint_id=path + "/child")
    dcp.async_save({"w": state["w"] + 2}, checkpoint_id=path + "/child-async").result()
    sys.exit()
default._lock.release()
assert os.waitpid(child, 0)[1] == 0
assert not pending.done()
released.set()
pending.result()
assert dcp.default_engine() is inherited
dcp.async_save({"w": state["w"] + 3}, checkpoint_id=path + "/after").result()
engine.close()
"""


def test_a_fork_makes_its_own(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    stored = {"before": 1, "child": 2, "child-async": 3, "pending": 1, "after": 4}
    for name, value in stored.items():
        state = {"w": torch.zeros(9)}
        dcp.load(state, checkpoint_id=tmp_path / name, no_dist=True)
        assert state["w"].tolist() == [value] * 9, name
    assert not (tmp_path / "never").exists()
