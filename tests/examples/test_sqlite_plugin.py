"""The example plug-in, as its users have it: installed into an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import pytest

from dcp_engine.registry import ENTRY_POINT_GROUP, BackendRegistry

SOURCE = Path(__file__).parents[2] / "docs" / "examples" / "sqlite_store"

pytestmark = [pytest.mark.multirank, pytest.mark.slow]


class Environment:
    """A fresh virtual environment that sees what is installed here, and has the plug-in too."""

    def __init__(self, root: Path) -> None:
        self.python = root / "venv" / "bin" / "python"
        self.source = root / "sqlite_store"
        venv.create(root / "venv", symlinks=True)
        # torch is a gigabyte: seen, not installed again. Editable installs too, hence addsitedir.
        (site_packages,) = (root / "venv").glob("lib/python*/site-packages")
        here = sysconfig.get_paths()["purelib"]
        (site_packages / "outer.pth").write_text(f"import site; site.addsitedir({here!r})\n")
        # A copy, so that building leaves nothing in the source tree.
        ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(SOURCE, self.source, ignore=ignored)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
        self._run([*pip, "--python", str(self.python), "install", *options, str(self.source)])

    def run(self, *arguments: str, cwd: Path) -> str:
        """What ``python <arguments>`` prints there."""
        return self._run([str(self.python), *arguments], cwd=cwd)

    @staticmethod
    def _run(command: list[str], cwd: Path | None = None) -> str:
        # Nothing of this checkout comes in by the back door.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
        done = subprocess.run(
            command, cwd=cwd, env=inherited, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("plugin"))


def test_it_is_found_by_its_entry_point(environment: Environment, tmp_path: Path) -> None:
    assert "sqlite" not in BackendRegistry().schemes()
    program = f"""
from importlib import metadata, util
(point,) = metadata.entry_points(group={ENTRY_POINT_GROUP!r}, name="sqlite")
print(point.value)
print(util.find_spec("dcp_engine_sqlite").origin)
"""
    value, origin = environment.run("-c", program, cwd=tmp_path).splitlines()
    assert value == "dcp_engine_sqlite:SQLiteBackend"
    # The package itself: the kit and the job below get their stores by the URL alone.
    assert "site-packages" in origin


def test_it_passes_the_kit_there(environment: Environment, tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # where each of some thousand transactions waits for no disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as scratch:
        options = ["-q", "-p", "no:cacheprovider", "-n", "0", f"--basetemp={scratch}/pytest"]
        printed = environment.run("-m", "pytest", *options, "tests", cwd=environment.source)
    assert "failed" not in printed
    assert int(printed.splitlines()[-1].split(" passed")[0]) > 100


def test_two_ranks_save_and_load(environment: Environment, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    place = f"sqlite://{tmp_path}/c.db"
    printed = environment.run(*torchrun, str(environment.source / "train.py"), place, cwd=tmp_path)
    lines = sorted(line for line in printed.splitlines() if line.startswith("rank"))
    assert lines == ["rank 0: step 7, same rows", "rank 1: step 7, same rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["c.db"]
