"""Workers for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dcp_engine.executors.process import WorkerProcess, WorkerSettings

ROOT = Path(__file__).parents[2]
LIMIT = 60.0

_LIGHT = f"""
import sys, types
package = types.ModuleType("dcp_engine")
package.__path__ = [{str(ROOT / "dcp_engine")!r}]
sys.modules["dcp_engine"] = package
"""

Make = Callable[..., WorkerProcess]


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which ``import dcp_engine.executors`` does not import the whole package, and
    with it torch, which takes seconds of a processor in every process."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "sitecustomize.py").write_text(_LIGHT)
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *([inherited] if inherited else [])])}


@pytest.fixture(scope="module")
def tools(light: dict[str, str]) -> Iterator[WorkerProcess]:
    """One worker for all tests of a module."""
    settings = WorkerSettings(
        handler="tests.executors.handlers:tools",
        init=b"hello",
        name="tools",
        rank=3,
        environment={**light, "EXTRA": "given"},
    )
    with WorkerProcess(settings) as worker:
        worker.started.result(LIMIT)
        yield worker


@pytest.fixture
def make(light: dict[str, str]) -> Iterator[Make]:
    """Workers of one test."""
    made: list[WorkerProcess] = []

    def make_one(
        handler: str = "tools", *, ready: bool = True, **settings: object
    ) -> WorkerProcess:
        if ":" not in handler:
            handler = f"tests.executors.handlers:{handler}"
        given: dict[str, object] = {"name": "test", "environment": light, **settings}
        worker = WorkerProcess(WorkerSettings(handler=handler, **given))  # type: ignore[arg-type]
        made.append(worker)
        worker.start()
        if ready:
            worker.started.result(LIMIT)
        return worker

    yield make_one
    for worker in made:
        worker.close(0)
