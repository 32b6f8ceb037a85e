"""The examples of docs/async.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dcp_engine as dcp

PAGE = Path(__file__).parents[2] / "docs" / "async.md"


def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    dcp.default_engine().close()
    for path in ("checkpoint", "second"):
        into = {"step": 0, "model": {"weight": torch.zeros(256, 256)}}
        dcp.load(into, checkpoint_id=path, no_dist=True)
        assert into["step"] == 30
        assert torch.equal(into["model"]["weight"], names["model"].weight)  # type: ignore[attr-defined]
