"""``load(latest_in=)`` on two ranks: one looks, both load the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp

pytestmark = pytest.mark.multirank


def load_latest(root: str) -> dict[str, Any]:
    """Three checkpoints, the newest damaged; then none."""
    for step in (1.0, 2.0, 3.0):
        dcp.save({"w": torch.full((50,), step)}, checkpoint_id=f"{root}/{int(step)}")
    if torch.distributed.get_rank() == 0:
        (manifest,) = Path(root).glob("3/manifest.json")
        manifest.write_bytes(manifest.read_bytes()[:-40])
    torch.distributed.barrier()
    state = {"w": torch.zeros(50)}
    report = dcp.load(state, latest_in=root)
    assert report.latest is not None
    try:
        dcp.load(state, latest_in=f"{root}/nowhere")
    except dcp.CheckpointException as error:
        failures = sorted(error.failures)
    return {
        "value": state["w"].unique().tolist(),
        "passed over": [p.checkpoint for p in report.latest.passed_over],
        "failures": failures,
    }


def test_all_ranks_load_what_one_found(ranks: Any, tmp_path: Path) -> None:
    for found in ranks.run(2, load_latest, str(tmp_path)):
        assert found == {
            "value": [2.0],
            "passed over": [f"{tmp_path}/3"],
            "failures": [0],
        }
