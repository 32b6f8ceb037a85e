"""Jobs that end right after ``async_save``, without a launcher whose store outlives them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dcp_engine as dcp

pytestmark = [pytest.mark.multirank, pytest.mark.torture]

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch
import torch.distributed as dist
import dcp_engine as dcp

rank, port, path, kind, ending = sys.argv[1:]
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2
)
dcp.async_save(
    {"w": torch.ones(1000)},
    checkpoint_id=path,
    async_checkpointer_type=dcp.AsyncCheckpointerType(kind),
)
if ending == "destroy":
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("ending", ["destroy", "exit"])
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_the_store_lives_until_the_save_is_over(tmp_path: Path, kind: str, ending: str) -> None:
    """Rank 0 hosts it; both ranks are through with the save before that one ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), port, str(tmp_path / "c"), kind, ending],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for rank in (0, 1)
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
        assert "an asynchronous save failed" not in errors
    into = {"w": torch.zeros(1000)}
    dcp.load(into, checkpoint_id=tmp_path / "c", no_dist=True)
    assert into["w"].unique().tolist() == [1.0]
