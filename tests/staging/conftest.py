"""Fixtures of the staging tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_engine.staging.arena_stager import ArenaStager
from dcp_engine.staging.stagers import DefaultStager
from tests.staging.states import RANK


@pytest.fixture
def arenas() -> Iterator[ArenaStager]:
    with ArenaStager(threads=2) as stager:
        yield stager


@pytest.fixture
def stager() -> Iterator[DefaultStager]:
    with DefaultStager(threads=2) as stager:
        yield stager


@pytest.fixture
def fake_group() -> Iterator[None]:
    dist.init_process_group("fake", rank=RANK, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()
