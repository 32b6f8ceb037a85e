"""The first save or load opens the session: a rank that does not come is told by the deadline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_engine as dcp

pytestmark = pytest.mark.multirank


def first(path: str, operation: str, absent: int) -> dict[str, Any] | None:
    """On the rank that comes: what became of it, and how long that took."""
    if dist.get_rank() == absent:
        return None
    state = {"w": torch.ones(3)}
    began = time.monotonic()
    try:
        getattr(dcp, operation)(state, checkpoint_id=path, timeout=1.0)
    except dcp.CheckpointException as error:
        seconds = time.monotonic() - began
        return {"kind": error.kind, "text": str(error), "seconds": seconds}
    return {"kind": None}


@pytest.mark.parametrize(("operation", "absent"), [("save", 1), ("save", 0), ("load", 1)])
def test_a_rank_that_never_comes(ranks: Any, tmp_path: Path, operation: str, absent: int) -> None:
    result = ranks.run(2, first, str(tmp_path / "c"), operation, absent)[1 - absent]
    assert result["kind"] == "timeout", result
    assert "handshake" in result["text"] or "welcomed by rank 0" in result["text"]
    assert str(tmp_path / "c") in result["text"]
    if absent == 1:
        assert "missing ranks [1]" in result["text"]
    assert result["seconds"] < 30.0  # not the five minutes of connect_timeout
