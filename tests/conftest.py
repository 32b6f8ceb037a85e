"""Fixtures and settings for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.multirank.pool import RankPool

# No deadlines: the machine may be busy. In CI the same examples every time, so that a red run can
# be repeated; elsewhere (HYPOTHESIS_PROFILE=explore) new ones.
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Real processes that form a gloo group, kept alive over all tests; ``ranks.run``."""
    pool = RankPool()
    yield pool
    pool.close()
