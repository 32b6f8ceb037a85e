"""Packing and unpacking the counter words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dcp_engine.coordination.words import (
    ALARM,
    EVENT,
    FAILURE,
    REPORT,
    Pulse,
    Tally,
    arrived,
)


@given(st.integers(0, 2**24 - 1), st.integers(0, 2**14 - 1), st.integers(0, 2**25 - 1))
def test_a_tally_is_the_sum_of_what_was_added(reports: int, failures: int, events: int) -> None:
    word = reports * REPORT + failures * FAILURE + events * EVENT
    assert word < 2**63
    assert Tally.unpack(word) == Tally(reports=reports, failures=failures, events=events)


@given(st.integers(0, 2**20), st.integers(0, 2**31), st.booleans())
def test_a_pulse_keeps_steps_beats_and_alarm_apart(steps: int, beats: int, alarm: bool) -> None:
    word = arrived(steps) + beats + (ALARM if alarm else 0)
    assert word < 2**63
    assert Pulse.unpack(word) == Pulse(steps=steps, beats=beats, alarm=alarm)


def test_a_beat_after_the_alarm_still_shows_it() -> None:
    assert Pulse.unpack(ALARM + 1).alarm
