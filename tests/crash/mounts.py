"""Small file systems of one's own, where the machine lets us have them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["remount", "tmpfs"]


@contextmanager
def tmpfs(place: Path, options: str) -> Iterator[Path]:
    """A tmpfs at ``place``, mounted with ``options``. Skips the test where that is not allowed."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"{options},mode=0777", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        who = "" if os.geteuid() else ", though we are root"
        pytest.skip(f"mounting a tmpfs is not permitted here{who}: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=20)


def remount(place: Path, options: str) -> None:
    """Change the options of a mounted tmpfs."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True, timeout=20)
