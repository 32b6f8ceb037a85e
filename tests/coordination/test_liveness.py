"""Who counts as missing or stalled, on a clock of the test's own."""

from __future__ import annotations

from dcp_engine.coordination.liveness import Liveness, describe_missing
from dcp_engine.coordination.words import Pulse


def pulse(steps: int, beats: int) -> Pulse:
    return Pulse(steps=steps, beats=beats, alarm=False)


def test_a_pulse_that_does_not_change_is_silence() -> None:
    liveness = Liveness([1, 2])
    liveness.observe({1: pulse(0, 1), 2: pulse(0, 1)}, now=100.0)
    liveness.observe({1: pulse(0, 1), 2: pulse(0, 2)}, now=109.0)
    assert liveness.stalled(0, now=111.0, limit=10.0) == [1]
    assert liveness.silence(1, 111.0) == 11.0
    assert liveness.silence(2, 111.0) == 2.0


def test_who_has_reported_may_be_silent() -> None:
    liveness = Liveness([1, 2])
    liveness.observe({1: pulse(1, 0), 2: pulse(0, 7)}, now=0.0)
    assert liveness.missing(0) == [2]
    assert liveness.stalled(0, now=1000.0, limit=10.0) == [2]
    assert liveness.missing(1) == [1, 2]


def test_who_was_never_heard_is_missing_but_not_stalled() -> None:
    liveness = Liveness([1, 2])
    liveness.observe({1: pulse(0, 1)}, now=0.0)
    assert liveness.missing(0) == [1, 2]
    assert liveness.stalled(0, now=50.0, limit=10.0) == [1]
    assert liveness.silence(2, 50.0) is None


def test_the_message_names_ranks_phase_and_times() -> None:
    waited = 'in phase "write" after 30 s'
    text = describe_missing([3, 7], waited, [12.3, 11.9])
    assert text == 'missing ranks [3, 7] in phase "write" after 30 s, last heard 12 s ago'
    assert describe_missing([3], waited, [None]).endswith("never heard in this operation")
    assert describe_missing([3, 4], waited, [2.0, 40.0]).endswith("last heard 2.0 s to 40 s ago")
    many = describe_missing(list(range(100)), waited, [])
    assert "31, ...]" in many and "32" not in many
