"""A training script for ``torchrun``, one rank per agent: saves by worker processes, one of which
is killed in a write. Leaves what it found in ``<notes>/rank<n>.json``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

import dcp_engine as dcp
from tests.async_saver.gated import Gate, GatedWriter
from tests.multirank.async_cases import LIMIT, holds, outcome, save


def main(path: str, notes: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    gate = Gate(notes / f"gate-{rank}")
    with dcp.Engine() as engine:
        save(engine, "process", path, 1.0).result(LIMIT)
        found: dict[str, object] = {"first": holds(path, 1.0), "agents": os.getppid()}
        writer: dcp.StorageWriter = dcp.FileSystemWriter(path)
        if rank == 1:
            writer = GatedWriter(path, gate, "write_columns")
        response = save(engine, "process", path, 2.0, storage_writer=writer)
        if rank == 1:
            gate.wait_for_visitor()
            assert engine.worker_pid is not None
            os.kill(engine.worker_pid, signal.SIGKILL)
        found["killed"] = outcome(response)
        found["old"] = holds(path, 1.0)
        save(engine, "process", path, 3.0).result(LIMIT)
        found["next"] = holds(path, 3.0)
    (notes / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
