"""The documented training script, small: what it saves is enough to go on with the same bits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.torch_features import CPU_FSDP

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SMALL = ["--width", "32", "--layers", "1", "--batch", "4", "--save-every", "2"]

pytestmark = [pytest.mark.multirank, pytest.mark.slow]


@pytest.fixture(scope="module")
def jobs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_jobs", EXAMPLES / "jobs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digests(file: Path) -> dict[str, str]:
    loaded: dict[str, str] = json.loads(file.read_text())
    return loaded


@pytest.mark.skipif(not CPU_FSDP, reason="this torch's FSDP2 does not train on CPU")
def test_resumed_job_ends_with_the_same_bits(jobs: ModuleType, tmp_path: Path) -> None:
    def run(name: str, checkpoint: str, steps: int, *more: str) -> dict[str, str]:
        results = tmp_path / name
        where = ["--checkpoint", str(tmp_path / checkpoint), "--steps", str(steps)]
        with jobs.Job(2, results, [*SMALL, *where, *more]) as job:
            job.wait(120)
        return digests(results / "final.json")

    uninterrupted = run("uninterrupted", "a", 4, "--async", "thread")
    run("first-half", "b", 2)
    assert run("second-half", "b", 4, "--resume", "--async", "process") == uninterrupted
    assert run("loaded", "b", 4, "--resume") == uninterrupted

    halfway = digests(tmp_path / "uninterrupted" / "step000002.json")
    assert halfway == digests(tmp_path / "first-half" / "final.json")
    assert halfway.keys() == uninterrupted.keys()
    weights = [name for name in halfway if "norm" not in name]
    assert all(halfway[name] != uninterrupted[name] for name in weights)


def test_a_job_without_its_checkpoint_fails_and_says_so(jobs: ModuleType, tmp_path: Path) -> None:
    where = ["--checkpoint", str(tmp_path / "nothing-here"), "--steps", "1", "--resume"]
    with (
        jobs.Job(2, tmp_path / "results", [*SMALL, *where]) as job,
        pytest.raises(jobs.JobFailed, match="not_found"),
    ):
        job.wait(120)
