"""What the store thread does on the rank that decides.

Belongs here: gathering reports, noticing failures, silence and passed deadlines, telling all
ranks. Does not belong here: ``local`` and ``decide``, which run on the calling thread while this
one keeps looking: a rank that fails is known to all even if the coordinator is in a long write.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Literal

from dcp_engine.coordination.failures import FailureRecord, bounded, silent_rank
from dcp_engine.coordination.liveness import Liveness, describe_missing
from dcp_engine.coordination.messages import Event, FailureVerdict, Report, decode, encode
from dcp_engine.coordination.role import Failed, Granted, Reply, Role, RoleContext
from dcp_engine.coordination.store_client import WaitTimeout
from dcp_engine.coordination.words import ALARM, EVENT, FAILURE, Pulse, Tally

__all__ = ["CoordinatorRole"]

_NEVER = 3600.0
_OBSERVE_MAX = 5.0
"""Seconds between two looks at all pulses, at most."""


class CoordinatorRole(Role):
    """Looks at one counter again and again, and speaks to all when there is something to say."""

    def __init__(self, context: RoleContext) -> None:
        super().__init__(context)
        self._others = [rank for rank in range(self.world_size) if rank != self.rank]
        self._state: Literal["idle", "local", "gathering", "deciding"] = "idle"
        self._phase = ""
        self._decide_phase = ""
        self._own_payload = b""
        self._gathering_since = 0.0
        self._next_poll = 0.0
        self._next_tick = 0.0
        self._next_observation = 0.0
        self._events = 0
        self._first_event = 1
        self._last_verdict = 0
        self._last_step = -1
        self._obsolete = 0
        """Events up to this index have been read by all ranks."""
        self._split_events: dict[int, int] = {}
        self._has_answers = False
        self._liveness = Liveness(self._others)
        self._failures: list[FailureRecord] = []
        self._failures_read: set[int] = set()
        self._missed: set[int] = set()
        self._verdict_text: tuple[str, str] | None = None
        self._first_failure: float | None = None
        self._failed_in = ""
        self._own_failed = False

    # -- the calling thread asks ---------------------------------------------------------------

    def begin_step(self, step: int, phase: str, decide_phase: str) -> None:
        """``local`` begins; from now on the others may be missed."""
        now = self.clock.now()
        if self.step < 0:
            # Before anything can happen here the others learn that there is a coordinator.
            self._emit(self._tick())
        self.step = step
        self._phase = phase
        self._decide_phase = decide_phase
        self._state = "local"
        self._next_poll = now + self.rhythm.idle_poll
        self._next_observation = now + self._observation_interval()

    def report(self, payload: bytes, phase: str, reply: Future[Reply]) -> None:
        """The coordinator's own report needs no message."""
        self.pending = reply
        self._own_payload = payload
        self._state = "gathering"
        self._gathering_since = self._next_poll = self.clock.now()

    def conclude(self, common: bytes, answers: list[bytes] | None, reply: Future[Reply]) -> None:
        """The decision goes to all ranks, unless somebody failed meanwhile."""
        self.pending = reply
        now = self.clock.now()
        if self.outcome is None and now >= self._next_poll:
            # Overdue: this process may have been stopped, and the others have given it up.
            self._look(now)
        if self.outcome is not None:
            self._resolve(Failed(verdict=self.outcome))
            return
        if self._first_failure is not None:
            self._own_failed = True  # nothing is expected of this rank any more
            return
        if answers is not None:
            self._has_answers = True
            self.client.multi_put({self.keys.answer(rank): answers[rank] for rank in self._others})
        self._emit(
            Event(kind="verdict", step=self.step, common=common, has_answers=answers is not None)
        )
        self._last_verdict, self._last_step = self._events, self.step
        self._state = "idle"
        own = answers[self.rank] if answers is not None else b""
        self._resolve(Granted(common=common, answer=own))

    def fail(self, record: FailureRecord, reply: Future[Reply]) -> None:
        """The coordinator failed itself; the others get their grace."""
        self.pending = reply
        self._own_failed = True
        if self.outcome is not None:
            self._resolve(Failed(verdict=self.outcome))
        elif not record.consequence:
            self._notice([record], own=True)

    def abandon(self, record: FailureRecord) -> None:
        """The coordinator leaves: the verdict comes at once."""
        self._resolve(Failed(verdict=FailureVerdict(records=[record])))
        if self.outcome is None:
            self._notice([record], own=True)
            self._publish()

    def depart(self) -> None:
        """Say how far the events are removed, and leave."""
        self._remove_events(limit=None)
        self.client.set(self.keys.first_event, str(self._first_event).encode())
        # An alarm may have written the pulse of a rank that had left already.
        self._leave(clean=self._first_failure is None, own=[])

    # -- turns ---------------------------------------------------------------------------------

    def turn(self) -> float:
        """Look at the tally, and do what follows."""
        if self.client.lost is not None or self.step < 0 or self.left:
            return _NEVER
        now = self.clock.now()
        if self.outcome is None:
            if now >= self._next_poll:
                self._look(now)
            if self.outcome is None and now >= self._next_tick:
                self._emit(self._tick())
                self._remove_events(limit=4)
        if self.outcome is not None:
            self._resolve(Failed(verdict=self.outcome))
            return _NEVER
        return max(min(self._next_poll, self._next_tick) - self.clock.now(), 0.0)

    def _look(self, now: float) -> None:
        tally = Tally.unpack(self.client.add(self.keys.tally, 0))
        if tally.failures > 0:
            self._read_failures()
        if self._first_failure is not None:
            if self._all_in(tally) or now >= self._first_failure + self.rhythm.grace:
                self._publish()
            self._next_poll = now + 0.02
            return
        if self._state == "gathering" and tally.reports >= self._expected():
            self._collect()
        elif self._state in ("local", "gathering") and now >= self._next_observation:
            self._observe(now)
        if self._first_failure is None and self._state != "idle":
            self._mind_the_deadline()
        wait = (
            self.rhythm.poll_after(now - self._gathering_since)
            if self._state == "gathering"
            else self.rhythm.idle_poll
        )
        self._next_poll = self.clock.now() + wait

    def _expected(self) -> int:
        return len(self._others) * (self.step + 1)

    def _all_in(self, tally: Tally) -> bool:
        own_done = self._own_failed or self._state == "gathering"
        # one of the failures is this rank's mark, see _notice
        return own_done and tally.reports + tally.failures - 1 >= self._expected()

    def _collect(self) -> None:
        payloads: list[bytes] = []
        strays: list[FailureRecord] = []
        data = self.client.multi_take([self.keys.report(rank) for rank in self._others])
        for rank, encoded in zip(self._others, data, strict=True):
            report = decode(encoded, Report)
            if report.heading != self.context.heading or (report.step, report.phase) != (
                self.step,
                self._phase,
            ):
                strays.append(self._out_of_step(rank, report))
            payloads.append(report.payload)
        # A rank that has reported for this step has read the verdict of the one before.
        self._obsolete = self._last_verdict
        if strays:
            self._notice(strays, own=False)
            return
        payloads.insert(self.rank, self._own_payload)
        self._state = "deciding"
        if self._decide_phase != self._phase:
            self.clock.enter(self._decide_phase)
        self._resolve(Granted(reports=payloads))

    def _out_of_step(self, rank: int, report: Report) -> FailureRecord:
        here = f'{self.context.heading.describe()}, step {self.step} "{self._phase}"'
        there = f'{report.heading.describe()}, step {report.step} "{report.phase}"'
        return silent_rank(
            rank, f"rank {self.rank} is in {here}, but rank {rank} in {there}", "out_of_step"
        )

    # -- silence -------------------------------------------------------------------------------

    def _observation_interval(self) -> float:
        stall = self.clock.deadlines.stall_timeout
        if stall is None:
            return _OBSERVE_MAX
        return min(max(stall / 8, self.rhythm.interval / 2), _OBSERVE_MAX)

    def _read_pulses(self) -> None:
        keys = {rank: self.keys.pulse(rank) for rank in self._others}
        if not self.client.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if self.client.check([key])}
        try:
            words = self.client.multi_get(list(keys.values()))
        except WaitTimeout:
            return  # a rank left just now, and took its key along
        pulses = {rank: Pulse.unpack(int(word)) for rank, word in zip(keys, words, strict=True)}
        self._liveness.observe(pulses, self.clock.now())

    def _observe(self, now: float) -> None:
        self._read_pulses()
        self._next_observation = now + self._observation_interval()
        if self._state == "gathering" and not self._liveness.missing(self.step):
            # A rank publishes its report before it counts it, and may have died in between.
            self._collect()
            return
        stall = self.clock.deadlines.stall_timeout
        if stall is None:
            return
        limit = max(stall, 3 * self.rhythm.interval)
        stalled = self._liveness.stalled(self.step, self.clock.now(), limit)
        if stalled:
            self._miss(stalled, "stalled")

    def _mind_the_deadline(self) -> None:
        remaining = self.clock.remaining()
        if remaining is None or remaining > 0:
            return
        if self._state == "deciding":
            self._blame_coordinator()
            return
        self._read_pulses()
        missing = self._liveness.missing(self.step)
        if missing:
            self._miss(missing, "timeout")
        if self._state == "local":
            self._blame_coordinator()
        # else all reports are there, and the next observation collects them

    def _miss(self, ranks: list[int], kind: str) -> None:
        now = self.clock.now()
        waited = self.clock.waited()
        silences = [self._liveness.silence(rank, now) for rank in ranks]
        self._missed.update(ranks)
        self._verdict_text = (describe_missing(ranks, waited, silences), kind)
        self._notice(
            [
                silent_rank(rank, describe_missing([rank], waited, [silence]), kind)
                for rank, silence in zip(ranks, silences, strict=True)
            ],
            own=False,
        )

    def _blame_coordinator(self) -> None:
        message = f"rank {self.rank}, the coordinator, has not finished {self.clock.waited()}"
        if self._verdict_text is not None:
            self._verdict_text = (f"{self._verdict_text[0]}; {message}", "timeout")
            self._missed.add(self.rank)
        self._notice([silent_rank(self.rank, message, "timeout")], own=True)

    # -- failures ------------------------------------------------------------------------------

    def _read_failures(self) -> None:
        """Failures are read in the order in which they were announced."""
        found: list[FailureRecord] = []
        for index in range(1, self.client.add(self.keys.failures, 0) + 1):
            key = self.keys.failure(index)
            if index not in self._failures_read and self.client.check([key]):
                found.append(decode(self.client.get(key), FailureRecord))
                self._failures_read.add(index)
        if found or self._first_failure is None:
            # none found: a rank gave this one up, and has said so in the outcome
            self._notice(found, own=False)

    def _notice(self, records: list[FailureRecord], *, own: bool) -> None:
        """First failure: alarm everybody, and begin the grace."""
        self._failures.extend(records)
        if self._first_failure is not None:
            return
        self._first_failure = self.clock.now()
        phases = {"deciding": self._decide_phase, "idle": ""}
        # Between steps the others may be in the next one already: each says then where it is.
        self._failed_in = phases.get(self._state, self._phase)
        self._next_poll = self._first_failure
        self.alarm.set()
        # so that ranks which report from now on see it in the answer
        self.client.add(self.keys.tally, FAILURE)
        self.client.multi_set({self.keys.pulse(rank): str(ALARM).encode() for rank in self._others})
        self._emit(Event(kind="failure"))

    def _publish(self) -> None:
        text, kind = self._verdict_text or (None, None)
        if any(record.rank not in self._missed for record in self._failures):
            text = kind = None  # somebody failed for another reason: the first cause speaks
        self._settle(
            FailureVerdict(
                records=bounded(self._failures), message=text, kind=kind, phase=self._failed_in
            )
        )

    # -- events --------------------------------------------------------------------------------

    def _tick(self) -> Event:
        return Event(kind="tick", step=self._last_step, last_verdict=self._last_verdict)

    def _emit(self, event: Event) -> None:
        index = self._events + 1
        key = self.keys.event(index)
        split = self.client.multi_put({key: encode(event)})
        if split:
            self._split_events[index] = split[key]
        self._events = index
        self.client.add(self.keys.tally, EVENT)
        self._next_tick = self.clock.now() + self.rhythm.interval

    def _remove_events(self, *, limit: int | None) -> None:
        last = self._obsolete
        if limit is not None:
            last = min(last, self._first_event + limit - 1)
        while self._first_event <= last:
            key = self.keys.event(self._first_event)
            self.client.delete_pieces(key, self._split_events.pop(self._first_event, 0))
            self.client.delete(key)
            self._first_event += 1
