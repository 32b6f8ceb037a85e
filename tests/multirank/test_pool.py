"""The pool of rank processes that the other multi-rank tests stand on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.multirank import pool_cases
from tests.multirank.pool import RankPool, RanksFailed

pytestmark = pytest.mark.multirank


def test_processes_are_kept_and_groups_are_new(ranks: RankPool) -> None:
    small = ranks.run(2, pool_cases.ids)
    large = ranks.run(4, pool_cases.ids)
    assert [(rank, size) for rank, size, _ in small] == [(0, 2), (1, 2)]
    assert [(rank, size) for rank, size, _ in large] == [(rank, 4) for rank in range(4)]
    assert [pid for *_, pid in small] == [pid for *_, pid in large[:2]]


def test_a_failure_shows_the_tracebacks_of_all_that_failed(ranks: RankPool) -> None:
    before = ranks.run(2, pool_cases.ids)
    with pytest.raises(RanksFailed) as caught:
        ranks.run(2, pool_cases.fail_on, 1)
    assert "rank 1: Traceback" in str(caught.value)
    assert "ValueError: boom on 1" in str(caught.value)
    assert "rank 0" not in str(caught.value)
    assert ranks.run(2, pool_cases.ids) == before


def test_a_hang_shows_where_and_is_ended(ranks: RankPool) -> None:
    before = ranks.run(2, pool_cases.ids)
    with pytest.raises(RanksFailed) as caught:
        ranks.run(2, pool_cases.hang_on, 1, timeout=4.0)
    assert "rank 1: no answer in time" in str(caught.value)
    assert "hang_on" in str(caught.value)
    after = ranks.run(2, pool_cases.ids)
    assert after[0] == before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_lost_rank_can_be_expected(ranks: RankPool, how: str) -> None:
    assert ranks.run(2, pool_cases.lose, 0, how, expect_kill=[0]) == [None, "here"]
    assert [rank for rank, *_ in ranks.run(2, pool_cases.ids)] == [0, 1]


def test_a_death_that_was_not_expected_is_a_failure(ranks: RankPool) -> None:
    with pytest.raises(RanksFailed, match="died with exit code -9"):
        ranks.run(2, pool_cases.lose, 1, "kill")


def test_a_result_that_cannot_be_sent_is_a_failure(ranks: RankPool) -> None:
    with pytest.raises(RanksFailed, match="unreadable"):
        ranks.run(1, pool_cases.unreadable)


@pytest.mark.parametrize("world_size", [2, 4, 2])
def test_meshes_of_earlier_cases_do_no_harm(ranks: RankPool, world_size: int) -> None:
    assert ranks.run(world_size, pool_cases.whole_tensor, 8) == [list(range(8))] * world_size


def test_a_rank_can_host_the_store(ranks: RankPool) -> None:
    ports = ranks.run(2, pool_cases.ids, host_in_rank=1)
    assert [rank for rank, *_ in ports] == [0, 1]


def test_a_forked_worker_is_as_a_real_one(ranks: RankPool) -> None:
    forked, real = (
        ranks.run(1, pool_cases.worker_surroundings, real_workers=real)[0] for real in (False, True)
    )
    assert forked == real
    assert real["a child of its parent"]
    assert real["environment"]["TOLD"] == "yes"
    assert real["children"] == [1, 0]
    assert real["left open"] == []
    assert "was killed by SIGKILL" in real["end"]


def test_ranks_do_not_outlive_their_parent() -> None:
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.multirank.pool_cases"],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None and parent.stdin is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 4
    parent.kill()
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    end = time.monotonic() + 20
    while any(_runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state not in "ZX"
