"""Worker processes in a job of several torchrun agents, as on several nodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.async_saver.gated import wait_until

pytestmark = [pytest.mark.multirank, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def test_two_agents_of_one_rank(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logs = [tmp_path / f"agent{node}.log" for node in (0, 1)]
    agents = [start_agent(node, port, tmp_path, logs[node]) for node in (0, 1)]
    try:
        for agent in agents:
            agent.wait(150)
    finally:
        for agent in agents:
            agent.terminate()  # it ends its ranks
            agent.wait(30)
    texts = "\n".join(log.read_text(errors="replace")[-4000:] for log in logs)
    notes = [tmp_path / f"rank{rank}.json" for rank in (0, 1)]
    assert all(note.exists() for note in notes), texts
    found = [json.loads(note.read_text()) for note in notes]
    assert found[0]["agents"] != found[1]["agents"]
    for of_rank in found:
        assert of_rank["first"]
        assert of_rank["killed"]["failed"] == [1]
        assert "SIGKILL" in of_rank["killed"]["text"]
        assert of_rank["old"]
        assert of_rank["next"]
    wait_until(lambda: not workers_of(tmp_path), "the end of the workers")


def start_agent(node: int, port: int, directory: Path, log: Path) -> subprocess.Popen[bytes]:
    """An agent that hosts the job's store itself, and not in its first rank, where it can."""
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in foreign}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    environment["DCP_ENGINE_TEST"] = str(directory)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--node-rank", str(node), "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command += ["-m", "tests.multirank.agent_job", str(directory / "c"), str(directory)]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )


def workers_of(directory: Path) -> list[int]:
    """Processes of that job which still run."""
    mark = f"DCP_ENGINE_TEST={directory}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue  # it has ended
    return found
