"""A storage backend that one rank cannot have: all ranks hear of it, at once."""

from __future__ import annotations

import errno
import os
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import dcp_engine as dcp
from tests.multirank.pool import RankPool

pytestmark = pytest.mark.multirank

CALLS = {
    "save": lambda engine, path: engine.save({"w": torch.ones(4)}, checkpoint_id=path),
    "async_save": lambda engine, path: engine.async_save(
        {"w": torch.ones(4)}, checkpoint_id=path
    ).result(60.0),
    "load": lambda engine, path: engine.load({"w": torch.zeros(4)}, checkpoint_id=path),
}


def _no_descriptors(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _without_backend_on_rank_1(path: str, call: str) -> dict[str, Any]:
    dcp.save({"w": torch.ones(4)}, checkpoint_id=path)
    looks = mock.patch.object(metadata, "entry_points", _no_descriptors)
    with looks if dist.get_rank() == 1 else mock.MagicMock():
        engine = dcp.Engine(timeout=600.0)  # looks for one, too
        try:
            CALLS[call](engine, path)
        except dcp.CheckpointError as error:
            ranks = getattr(error, "failures", {})
            found = {"kind": error.kind, "ranks": sorted(ranks), "text": str(error)}
    with engine:
        # Nothing is out of step, and the backend is found when it can be.
        CALLS[call](engine, path)
    return found


@pytest.mark.parametrize("call", CALLS)
def test_all_ranks_hear_of_it(ranks: RankPool, tmp_path: Path, call: str) -> None:
    other, own = ranks.run(2, _without_backend_on_rank_1, str(tmp_path / "c"), call, timeout=60)
    assert (other["kind"], other["ranks"]) == ("io_error", [1])
    assert own["kind"] == "io_error"
    for text in (other["text"], own["text"]):
        assert "ulimit -n" in text
