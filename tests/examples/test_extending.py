"""What the page on backends shows is what the example package holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dcp_engine as dcp
from storage_backends import testing

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "extending.md").read_text()
EXAMPLE = DOCS / "examples" / "sqlite_store"
EXCERPTS = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("file", "text"), EXCERPTS)
def test_excerpts(file: str, text: str) -> None:
    assert text in (EXAMPLE / file).read_text()


def test_there_are_excerpts() -> None:
    assert len(EXCERPTS) == 5


def test_the_planner_on_the_page_renames(tmp_path: Path) -> None:
    (text,) = re.findall(r"```python\n(import dataclasses\n.*?)```", PAGE, re.DOTALL)
    made: dict[str, Any] = {}
    exec(text, made)
    dcp.save({"net": {"w": torch.ones(3), "s": 5}}, checkpoint_id=tmp_path, no_dist=True)
    found = {"model": {"w": torch.zeros(3), "s": 0}}
    dcp.load(found, checkpoint_id=tmp_path, planner=made["Renaming"](), no_dist=True)
    assert found["model"]["w"].tolist() == [1, 1, 1]  # type: ignore[attr-defined]
    assert found["model"]["s"] == 5


def test_the_kit_is_described() -> None:
    undescribed = [name for name in testing.__all__ if name not in PAGE]
    assert undescribed == ["RecordedCall", "faulty_reader"]


@pytest.mark.parametrize("path", re.findall(r"`(tests/\S+\.py)`", PAGE))
def test_files_that_are_named_are_there(path: str) -> None:
    assert (DOCS.parent / path).is_file()
