"""What a process can say of its own memory, and running a measurement in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["current_rss", "peak_rss", "run_row"]

_ROOT = Path(__file__).parents[1]


def current_rss() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss() -> int:
    """The most bytes of memory that this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_row(module: str, request: dict[str, Any], timeout: float = 3600.0) -> dict[str, Any]:
    """Run ``python -m <module> '<request>'`` and return the JSON object that it prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(request)],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
