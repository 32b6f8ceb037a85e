"""The session over object collectives, on real ranks."""

from __future__ import annotations

import pytest

from dcp_engine.coordination.collective import missing_ranks
from tests.coordination import cases
from tests.multirank.pool import RankPool


def test_missing_ranks_are_read_from_gloos_message() -> None:
    text = "[Rank 0]: Ranks 1, 3 failed to pass monitoredBarrier in 1000 ms"
    assert missing_ranks(text) == [1, 3]
    assert missing_ranks("Connection closed by peer") == []


@pytest.mark.multirank
@pytest.mark.parametrize("failing", [[0], [1], [0, 1]])
def test_a_failure_is_raised_on_every_rank(ranks: RankPool, failing: list[int]) -> None:
    for result in ranks.run(2, cases.over_collectives, "fail_in_local", failing, "plain"):
        assert (result["type"], result["ranks"]) == ("CheckpointException", failing)
        assert 'in phase "write"' in result["text"]
        assert result["after"] == b"0|1"


@pytest.mark.multirank
@pytest.mark.parametrize("coordinator", [0, 1])
def test_a_failure_in_decide(ranks: RankPool, coordinator: int) -> None:
    for result in ranks.run(
        2, cases.over_collectives, "fail_in_decide", "unpicklable", coordinator
    ):
        assert result["ranks"] == [coordinator]
        assert "unpicklable boom" in result["text"]
        assert 'in phase "commit"' in result["text"]
        assert result["after"] == b"0|1"


@pytest.mark.multirank
def test_an_exit_is_raised_again_on_its_own_rank(ranks: RankPool) -> None:
    results = ranks.run(2, cases.over_collectives, "fail_in_local", [1], "interrupt")
    assert results[0]["types"] == {1: "KeyboardInterrupt"}
    assert results[1]["type"] == "KeyboardInterrupt"


@pytest.mark.multirank
def test_the_decision_comes_with_the_verdict(ranks: RankPool) -> None:
    results = ranks.run(3, cases.collective_decisions)
    assert results == [(None, "commit"), ("store_lost", "commit"), ("store_lost", "commit")]


@pytest.mark.multirank
def test_a_rank_that_hangs_is_named_by_rank_0(ranks: RankPool) -> None:
    results = ranks.run(3, cases.collective_hang, expect_kill=[1])
    assert (results[0]["kind"], results[0]["ranks"]) == ("timeout", [1])
    assert results[2]["kind"] == "timeout"
