"""What is known of a process without asking anybody."""

from __future__ import annotations

import os

import pytest

from dcp_engine.coordination.clock import OperationClock
from dcp_engine.coordination.group import describe_group, store_access
from dcp_engine.coordination.identity import run_identity
from dcp_engine.coordination.interface import Deadlines
from dcp_engine.coordination.open_session import open_session
from dcp_engine.coordination.single import SingleSession
from dcp_engine.errors import UsageError


def test_the_identity_comes_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    identity = run_identity("g")
    assert (identity.run_id, identity.restart_count, identity.group) == ("job-7", 3, "g")
    assert identity.pid == os.getpid()
    assert identity.host


@pytest.mark.parametrize("run_id", ["", "none"])
def test_a_run_without_a_name_of_its_own_has_none(
    monkeypatch: pytest.MonkeyPatch, run_id: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "x")
    assert (run_identity("").run_id, run_identity("").restart_count) == ("", 0)


def test_without_torch_distributed_there_is_one_rank() -> None:
    assert isinstance(open_session(), SingleSession)
    assert isinstance(open_session(no_dist=True), SingleSession)
    assert store_access(None) is None
    with pytest.raises(UsageError, match="not initialized"):
        describe_group(None)


def test_the_limits_of_a_phase_and_of_the_verdict_after_it() -> None:
    time = [0.0]
    deadlines = Deadlines(timeout=100.0, phases={"write": 10.0, "commit": 5.0})
    clock = OperationClock(deadlines, "save", "c", now=lambda: time[0])
    assert clock.remaining() == 100.0
    time[0] = 20.0
    clock.enter("write")
    time[0] = 24.0
    assert clock.remaining() == 6.0
    assert clock.remaining_for_verdict("commit") == 11.0
    assert clock.remaining_for_verdict("write") == 6.0
    assert clock.remaining_for_verdict("elsewhere") == 76.0
    clock.enter("other")
    assert clock.remaining() == clock.remaining_for_verdict("commit") == 76.0
