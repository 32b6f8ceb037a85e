"""The process group of the workers: over the job's store, and anew after one has died."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multirank import worker_group_cases
from tests.multirank.pool import RankPool

pytestmark = pytest.mark.multirank


def test_a_worker_that_died_is_replaced_in_the_next_generation(
    ranks: RankPool, tmp_path: Path
) -> None:
    results = ranks.run(2, worker_group_cases.generations, str(tmp_path / "store"), timeout=120)
    for result in results:
        assert result["step"] == b"01"
        assert result["first"] == (3, "gloo", 1)
        assert result["second"] == (30, "gloo", 2)
        assert "generation 1 of the workers' process group has passed" in result["past"]
        assert result["parents"] == 3
        assert result["file"] == (3, "gloo", 1)
    # The survivor's collective ends at once by an error, not by a timeout.
    assert results[0]["lost"] in ("RuntimeError", "DistBackendError", "WorkerFailure")
    assert results[1]["lost"] == "WorkerError"
