"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.checkpoints import reader


@pytest.fixture
def read_extra() -> Callable[[Path, str], bytes]:
    """``dcp_engine.read_extra`` without the registry, which knows installed backends only."""

    def read(place: Path, name: str) -> bytes:
        opened = reader(place)
        manifest, _ = opened.open_checkpoint(None)
        try:
            return opened.read_extra(manifest, name)
        finally:
            opened.close_checkpoint()

    return read
