"""Coordination between real processes: what is said when ranks fail, hang or die."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coordination import cases
from tests.multirank.pool import RankPool

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("failing", ["0", "1", "all"])
def test_a_failure_is_raised_on_every_rank(ranks: RankPool, world_size: int, failing: str) -> None:
    expected = list(range(world_size)) if failing == "all" else [int(failing)]
    for result in ranks.run(world_size, cases.run_with_session, "fail_in_local", expected, "plain"):
        assert result["type"] == "CheckpointException"
        assert sorted(result["ranks"]) == expected
        assert all(text == "plain boom" for text in result["texts"].values())
        assert all(frames[-1] == "raise_here" for frames in result["frames"].values())
        assert result["after"] == b"|".join(str(r).encode() for r in range(world_size))


@pytest.mark.parametrize("how", ["unpicklable", "poisoned", "base", "huge"])
def test_any_exception_travels(ranks: RankPool, how: str) -> None:
    for result in ranks.run(2, cases.run_with_session, "fail_in_local", [1], how, 0):
        assert result["ranks"] == [1]
        assert f"{how}" in result["texts"][1]
        assert "boom" in result["text"]
        assert "raise_here" in result["text"]


@pytest.mark.parametrize("how", ["interrupt", "exit"])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_exit_is_raised_again_on_its_own_rank(ranks: RankPool, how: str, failing: int) -> None:
    results = ranks.run(2, cases.run_with_session, "fail_in_local", [failing], how)
    own = "KeyboardInterrupt" if how == "interrupt" else "SystemExit"
    assert results[failing]["type"] == own
    other = results[1 - failing]
    assert (other["type"], other["types"]) == ("CheckpointException", {failing: own})


@pytest.mark.parametrize("how", ["plain", "unpicklable", "interrupt"])
@pytest.mark.parametrize("coordinator", [0, 1])
def test_a_failure_in_decide(ranks: RankPool, how: str, coordinator: int) -> None:
    results = ranks.run(2, cases.run_with_session, "fail_in_decide", how, coordinator)
    assert results[1 - coordinator]["ranks"] == [coordinator]
    assert 'in phase "commit"' in results[1 - coordinator]["text"]
    own = results[coordinator]
    assert own["type"] == ("KeyboardInterrupt" if how == "interrupt" else "CheckpointException")
    assert all(result["after"] == b"0|1" for result in results)


@pytest.mark.parametrize("coordinator", [0, 2])
def test_a_rank_that_hangs_is_named_at_the_deadline(ranks: RankPool, coordinator: int) -> None:
    results = ranks.run(4, cases.strike, 1, "hang", coordinator, "write", expect_kill=[1])
    for result in results[:1] + results[2:]:
        assert (result["kind"], result["ranks"]) == ("timeout", [1])
        assert 'missing ranks [1] in phase "write" after 1.' in result["text"]


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_dead_rank_is_named_by_its_silence(ranks: RankPool, how: str) -> None:
    results = ranks.run(4, cases.strike, 2, how, 0, "write", expect_kill=[2])
    for result in results[:2] + results[3:]:
        assert (result["kind"], result["ranks"], result["kinds"]) == (
            "stalled",
            [2],
            {2: "stalled"},
        )
        assert "missing ranks [2]" in result["text"]


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("phase", ["write", "commit"])
def test_a_dead_coordinator_is_named(ranks: RankPool, how: str, phase: str) -> None:
    ranks.run(3, cases.add_up, 1)
    logged = [len(ranks.log(rank)) for rank in range(3)]
    results = ranks.run(3, cases.strike, 0, how, 0, phase, expect_kill=[0])
    for rank, result in enumerate(results[1:], start=1):
        assert (result["kind"], result["ranks"]) == ("stalled", [0])
        assert "the coordinator" in result["text"]
        # A wait that ran out in the store would have been logged there, with names looked up.
        assert "c10d" not in ranks.log(rank)[logged[rank] :]


def test_a_coordinator_that_never_decides_is_named(ranks: RankPool) -> None:
    results = ranks.run(2, cases.strike, 0, "hang", 0, "commit", expect_kill=[0])
    assert (results[1]["kind"], results[1]["ranks"]) == ("timeout", [0])
    assert 'phase "commit"' in results[1]["text"]


@pytest.mark.parametrize("in_local", [True, False])
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_lost_store_names_its_host_and_no_ranks(
    ranks: RankPool, how: str, in_local: bool
) -> None:
    result = ranks.run(2, cases.strike_store_host, how, in_local, expect_kill=[0], host_in_rank=0)[
        1
    ]
    assert (result["kind"], result["decided"]) == ("store_lost", "store_lost")
    assert "the store at localhost:" in result["text"]
    assert result["ranks"] == []
    assert "frame #" not in result["text"]


@pytest.mark.parametrize("what", ["kind", "checkpoint", "phase"])
def test_ranks_in_different_operations(ranks: RankPool, what: str) -> None:
    for result in ranks.run(2, cases.out_of_step, what):
        assert (result["kind"], result["ranks"]) == ("out_of_step", [1])
        here, there = {
            "kind": ("save 0", "load 0"),
            "checkpoint": ("'ckpt'", "'other'"),
            "phase": ('"write"', '"read"'),
        }[what]
        assert here in result["texts"][1] and there in result["texts"][1]


def test_keys_of_an_earlier_run_let_nobody_in(ranks: RankPool) -> None:
    names = ranks.run(2, cases.with_stale_keys)
    assert names[0] == names[1]
    assert len(set(names[0])) == 2


def test_a_rank_that_does_not_open_the_session_is_named(ranks: RankPool) -> None:
    results = ranks.run(3, cases.missing_from_handshake)
    for result in results[:1] + results[2:]:
        assert result["kind"] == "timeout"
        assert "missing ranks [1]" in result["text"]


def test_a_failure_ends_the_long_write_of_the_others(ranks: RankPool) -> None:
    results = ranks.run(4, cases.alarm_a_long_write)
    assert all(result["ranks"] == [1] for result in results)
    assert [result["interrupted"] for result in results] == [True, False, True, True]


def test_sessions_on_two_groups_at_once(ranks: RankPool) -> None:
    rounds = 10
    for rank, (results, refused) in enumerate(ranks.run(4, cases.on_two_groups, rounds)):
        assert refused["kind"] == "usage", rank
        for index in range(rounds):
            whole = b"|".join(f"{index}.{r}".encode() for r in range(4))
            assert results["world"][index] == whole
            assert results["half"][index] == f"{index}.0|{index}.1".encode()


def test_two_operations_beside_training(ranks: RankPool) -> None:
    for results, sums, connections in ranks.run(2, cases.beside_training, 10):
        for index in (0, 1):
            assert results[index] == [
                f"{index}.{step}.0|{index}.{step}.1".encode() for step in range(10)
            ]
        assert sums == [2 * step + 1 for step in range(50)]
        assert connections == 2  # one for each operation that ran at once


def test_values_larger_than_the_store_takes(ranks: RankPool) -> None:
    size = 9 << 20
    for common, own, right in ranks.run(2, cases.echo_bytes, size):
        assert (common, own, right) == (2 * size + 1, size + 3, True)


def test_every_rank_learns_one_decision(ranks: RankPool) -> None:
    results = ranks.run(4, cases.race_to_decide, 20)
    assert all(result == results[0] for result in results)


def test_nothing_stays_in_the_store(ranks: RankPool) -> None:
    for counts, connections in ranks.run(2, cases.keys_after, 20):
        assert counts[0] == counts[1] == counts[2]
        assert connections == 1


def test_waiting_is_silent_and_cheap(ranks: RankPool) -> None:
    calls = ranks.run(2, cases.quiet_wait)
    assert calls[1] < 75  # 15 heartbeats, 15 events removed, the rest is handshake and step
    # one look each 50 ms, after a start that is denser, and two calls a tick
    assert calls[0] < 200
    for rank in (0, 1):
        log = ranks.log(rank).rsplit("quiet wait begins", 1)[-1]
        assert "waitForInput" not in log
        assert "frame #" not in log


@pytest.mark.parametrize("how", ["plain", "exit"])
def test_a_rank_that_leaves_between_steps_is_named(ranks: RankPool, how: str) -> None:
    results = ranks.run(2, cases.leave_early, how)
    assert results[0]["ranks"] == [1]
    assert results[1]["type"] == ("ValueError" if how == "plain" else "SystemExit")
    assert [result["after"] for result in results] == [b"x|x", b"x|x"]


def test_over_a_file_store(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(2, cases.over_file_store, str(tmp_path / "store"))
    assert results == [([1], b"0|1", 2 * (9 << 20) + 1)] * 2


def test_a_group_without_a_cpu_backend(ranks: RankPool) -> None:
    results = ranks.run(2, cases.without_cpu_backend, backend="fake")
    assert results == [(b"0|1", b"to 0"), (b"0|1", b"to 1")]


def test_a_fake_store_is_refused(ranks: RankPool) -> None:
    assert "no_dist=True" in ranks.run(1, cases.fake_store)[0]
