"""The examples of docs/checkpointer.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "checkpointer.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_there_is_one_example_of_each_way() -> None:
    functions, objects = EXAMPLES
    assert "dcp.save(" in functions
    assert "make_async_checkpointer()" in objects


@pytest.mark.parametrize("example", EXAMPLES, ids=["functions", "objects"])
def test_the_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(PAGE), "exec"), {"__name__": "example"})
    assert (tmp_path / "checkpoints").exists()
