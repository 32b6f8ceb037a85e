"""What the store thread does on the ranks that do not decide.

Belongs here: heartbeats while the calling thread works, the report, the blocking wait for the
coordinator's events, and what to do when they do not come. Does not belong here: judging other
participants; only the coordinator does.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from dcp_engine.coordination.clock import in_words
from dcp_engine.coordination.failures import FailureRecord, silent_rank
from dcp_engine.coordination.messages import Event, FailureVerdict, Report, decode, encode
from dcp_engine.coordination.role import (
    Failed,
    Granted,
    Reply,
    Role,
    RoleContext,
    announce_failure,
    propose,
)
from dcp_engine.coordination.store_client import AtLimit, StoreClient, WaitTimeout
from dcp_engine.coordination.words import EVENT, FAILURE, REPORT, Pulse, Tally, arrived

__all__ = ["ParticipantRole"]

_LEAD = 45.0
"""Seconds: longer than lookups of host names take where the name server does not answer."""
_NEVER = 3600.0
"""Seconds to sleep when nothing is due."""


class ParticipantRole(Role):
    """Beats, reports, waits."""

    def __init__(self, context: RoleContext) -> None:
        super().__init__(context)
        self._coordinator = context.heading.coordinator
        self._next_beat: float | None = None
        self._next_event = 1
        self._await_outcome = False
        self._waiting_since = 0.0
        self._heard: float | None = None
        """When the coordinator last gave a sign of life in this operation."""
        self._report_pieces = 0
        self._decide_phase = ""
        self._had_answer = False
        self._left_early = False
        # What one rank says in the coordinator's place all others hear: the first of them does, and
        # is ready for it; the others only if it has not, and connect only then.
        first = self.rank == min({0, 1} - {self._coordinator})
        self._stagger = 0.0 if first else self.rhythm.slack / 2
        self._lead = _LEAD if first else 0.0

    def turn(self) -> float:
        """One heartbeat, or one wait for the coordinator."""
        if self.client.lost is not None or self.left:
            return _NEVER
        if self.pending is None:
            return self._beat()
        if self._await_outcome:
            self._wait_for_outcome()
        else:
            self._wait_for_event()
        return 0.0

    def begin_step(self, step: int, phase: str, decide_phase: str) -> None:
        """Heartbeats begin with the first step, before anything can happen here."""
        self.step = step
        self._decide_phase = decide_phase
        if self._next_beat is None:
            self._next_beat = self.clock.now()
            self._beat()

    def report(self, payload: bytes, phase: str, reply: Future[Reply]) -> None:
        """Publish the report, count it, and wait from the next turn on."""
        self.pending = reply
        report = Report(heading=self.context.heading, step=self.step, phase=phase, payload=payload)
        key, pulse = self.keys.report(self.rank), self.keys.pulse(self.rank)
        split = self.client.multi_put(
            {key: encode(report)}, {pulse: str(arrived(self.step + 1)).encode()}
        )
        self._report_pieces = split.get(key, 0)
        tally = Tally.unpack(self.client.add(self.keys.tally, REPORT))
        self._begin_wait(tally)

    def fail(self, record: FailureRecord, reply: Future[Reply]) -> None:
        """Publish the failure and wait for the verdict that names all failures."""
        self.pending = reply
        self._publish(record)
        self._await_outcome = True
        self._waiting_since = self.clock.now()

    def abandon(self, record: FailureRecord) -> None:
        """Publish the failure; the wait that was going on, if any, is over."""
        self._left_early = self.outcome is None
        self._resolve(Failed(verdict=FailureVerdict(records=[record])))
        if self.outcome is None:
            self._publish(record)

    def depart(self) -> None:
        """A rank leaves clean if nobody will read its keys any more."""
        clean = not self._left_early and (
            self.outcome is not None or (self.pending is None and not self.alarm.is_set())
        )
        keys = self.keys
        own = [keys.pulse(self.rank), keys.report(self.rank)]
        if self._had_answer:
            own.append(keys.answer(self.rank))
        self._remove_report_pieces()
        self._leave(clean=clean, own=own)

    # -- sending -------------------------------------------------------------------------------

    def _publish(self, record: FailureRecord) -> None:
        if record.consequence:
            self.client.add(self.keys.tally, REPORT)  # only so that nobody waits for this rank
        else:
            announce_failure(self.client, self.keys, record)

    def _beat(self) -> float:
        if self._next_beat is None:
            return _NEVER
        now = self.clock.now()
        if now >= self._next_beat:
            pulse = Pulse.unpack(self.client.add(self.keys.pulse(self.rank), 1))
            if pulse.alarm:
                self.alarm.set()
            self._next_beat = now + self.rhythm.interval
        return max(self._next_beat - self.clock.now(), 0.0)

    # -- waiting -------------------------------------------------------------------------------

    def _begin_wait(self, tally: Tally) -> None:
        self._waiting_since = self.clock.now()
        if tally.events > 0:
            self._heard = self._waiting_since
        if tally.failures > 0:
            self.alarm.set()
            self._await_outcome = True
        # The coordinator publishes an event before it counts it: a rank that took the verdict of
        # the last step at once may find it not counted yet, and must not take it again. And it may
        # have used a report that was not counted yet: what was said last may be the verdict on it.
        self._next_event = max(self._next_event, tally.events)

    def _wait_for_event(self) -> None:
        kind, left = self._patience_for_events()
        if left <= 0:
            self._give_up(kind, self._heard if kind == "stalled" else None)
            return
        number = self._next_event
        speak = partial(self._speak_for_coordinator, number=number, kind=kind)
        event = self._event(number, left + self._stagger, speak if kind else None)
        if event is None:
            return  # the next turn gives up
        self._next_event += 1
        self._heard = self.clock.now()
        if event.kind == "tick" and event.step == self.step:
            # Nobody removes a verdict before this rank has reported in the step after it.
            event = self._event(event.last_verdict, self.client.patience) or event
        self._obey(event)

    def _patience_for_events(self) -> tuple[str, float]:
        """What it is called if the coordinator is silent for so many seconds more."""
        limits = {"": _NEVER}
        remaining = self.clock.remaining_for_verdict(self._decide_phase)
        if remaining is not None:
            limits["timeout"] = remaining + self.rhythm.slack
        stall = self.clock.deadlines.stall_timeout
        if stall is not None and self._heard is not None:
            patience = max(stall, 3 * self.rhythm.interval)
            limits["stalled"] = self._heard + patience - self.clock.now()
        return min(limits.items(), key=lambda item: item[1])

    def _event(self, number: int, limit: float, at_limit: AtLimit | None = None) -> Event | None:
        try:
            data, _ = self.client.take(self.keys.event(number), limit, at_limit, self._lead)
            return decode(data, Event)
        except WaitTimeout:
            return None

    def _obey(self, event: Event) -> None:
        if event.kind == "failure":
            self.alarm.set()
            self._await_outcome = True
            self._waiting_since = self.clock.now()
        elif event.kind == "verdict" and event.step == self.step:
            answer = b""
            if event.has_answers:
                self._had_answer = True
                key = self.keys.answer(self.rank)
                answer, pieces = self.client.take(key)
                self.client.delete_pieces(key, pieces)
            self._remove_report_pieces()
            self._next_beat = self.clock.now() + self.rhythm.interval
            self._resolve(Granted(common=event.common, answer=answer))

    def _wait_for_outcome(self) -> None:
        """The coordinator has seen a failure, or will soon; its verdict follows within the
        grace, unless it is gone too."""
        if self.outcome is None:
            now = self.clock.now()
            stall = self.clock.deadlines.stall_timeout
            limit = max(stall if stall is not None else 60.0, self.rhythm.slack)
            remaining = self.clock.remaining_for_verdict(self._decide_phase)
            if self._heard is None and remaining is not None:
                # It may not have begun the operation yet: the deadline is the limit.
                limit = max(limit, remaining + self.rhythm.slack)
            left = self._waiting_since + limit - now
            if left <= 0:
                self._give_up("stalled", self._waiting_since)
                return
            blame = partial(self._blame, kind="stalled", since=self._waiting_since)
            try:
                data = self.client.get(self.keys.outcome, left + self._stagger, blame, self._lead)
            except WaitTimeout:
                return
            self.outcome = decode(data, FailureVerdict)
            self.alarm.set()
        self._resolve(Failed(verdict=self.outcome))

    # -- a coordinator that is gone ------------------------------------------------------------

    def _give_up(self, kind: str, since: float | None) -> None:
        self.outcome = self._blame(self.client, kind, since)
        self.alarm.set()
        self._resolve(Failed(verdict=self.outcome))

    def _speak_for_coordinator(self, client: StoreClient, *, number: int, kind: str) -> None:
        """Its next event is overdue: unless it comes right now, say what it would say if it knew,
        to all ranks that wait for it; this one among them."""
        if not client.offer(self.keys.event(number), encode(Event(kind="failure"))):
            return
        client.add(self.keys.tally, EVENT)
        self._blame(client, kind, self._heard if kind == "stalled" else None)

    def _blame(self, client: StoreClient, kind: str, since: float | None) -> FailureVerdict:
        """Propose that the operation failed by the coordinator's silence.

        Args:
            since: when it was heard last; None if it never was.
        """
        last = "" if since is None else f", last heard {in_words(self.clock.now() - since)} ago"
        message = f"missing rank {self._coordinator}, the coordinator, {self.clock.waited()}{last}"
        record = silent_rank(self._coordinator, message, kind)
        # so that the coordinator, should it wake, looks for the outcome
        client.add(self.keys.tally, FAILURE)
        verdict = FailureVerdict(records=[record], message=message, kind=kind)
        return propose(client, self.keys, verdict)

    def _remove_report_pieces(self) -> None:
        self.client.delete_pieces(self.keys.report(self.rank), self._report_pieces)
        self._report_pieces = 0
