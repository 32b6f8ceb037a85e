"""What the tests with killed and starved processes share."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.crash.fork_server import ForkServer, Words


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts children."""
    with ForkServer(tmp_path_factory.mktemp("children")) as server:
        yield server


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    """Of a store that outlives all children."""
    store = dist.TCPStore(
        "localhost", 0, None, True, timeout=timedelta(seconds=60), wait_for_workers=False
    )
    yield store.port
    del store


@pytest.fixture
def words(tmp_path: Path) -> Iterator[Words]:
    """What children say."""
    heard = Words(tmp_path / "words")
    yield heard
    heard.close()
