"""Several programs on one disk, one operation at a time, in an order that a seed decides.

Belongs here: a scheduler for threads that do not wait for each other, and orders of a record of
ranks that do. Does not belong here: what the programs do.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from storage_backends.testing.crash.operations import Mark, Step

__all__ = ["Turns", "interleavings"]

_PATIENCE = 60.0
"""Seconds for one turn; more is a deadlock of the programs under test."""


class Turns:
    """Runs programs in threads of which one moves at a time, from ``pause`` to ``pause``.

    Give ``pause`` to the recorder as ``before``. Programs must not wait for each other.

    Args:
        seed: of the order.
        ahead: no chance, but: the first program has so many turns, then the others run to their
            ends one after the other, then the first goes on. Every place at which a program can be
            overtaken once is met by trying every number.
    """

    def __init__(self, seed: int, *, ahead: int | None = None) -> None:
        self._ahead = ahead
        self._taken = 0
        self._generator = random.Random(seed)
        self._condition = threading.Condition()
        self._turn: str | None = None
        self._waiting: set[str] = set()
        self._alive: set[str] = set()

    def pause(self) -> None:
        """Wait for the next turn; nothing in a thread that is not one of the programs'."""
        name = threading.current_thread().name
        with self._condition:
            if name not in self._alive:
                return
            self._waiting.add(name)
            self._turn = None
            self._condition.notify_all()
            self._wait(lambda: self._turn == name)
            self._waiting.discard(name)

    def _wait(self, due: Callable[[], bool]) -> None:
        if not self._condition.wait_for(due, _PATIENCE):
            raise TimeoutError("a program did not come to its next operation")

    def _next(self, first: str, alive: Sequence[str]) -> str:
        if self._ahead is None:
            return self._generator.choice(alive)
        self._taken += 1
        others = [name for name in alive if name != first]
        overtaken = self._taken > self._ahead
        return others[0] if others and (overtaken or first not in alive) else first

    def run(self, programs: Sequence[tuple[str, Callable[[], object]]]) -> None:
        """Run all of them to their ends; the first error of one is raised."""
        errors: list[BaseException] = []

        def life(name: str, program: Callable[[], object]) -> None:
            try:
                self.pause()
                program()
            except BaseException as error:
                errors.append(error)
            finally:
                with self._condition:
                    self._alive.discard(name)
                    self._turn = None
                    self._condition.notify_all()

        order = [name for name, _ in programs]
        self._alive = set(order)
        threads = [
            threading.Thread(target=life, args=item, name=item[0], daemon=True) for item in programs
        ]
        for thread in threads:
            thread.start()
        with self._condition:
            while True:
                self._wait(lambda: self._turn is None and self._waiting >= self._alive)
                if not self._alive:
                    break
                self._turn = self._next(order[0], [name for name in order if name in self._alive])
                self._condition.notify_all()
        for thread in threads:
            thread.join(_PATIENCE)
        if errors:
            raise errors[0]


def interleavings(steps: Sequence[Step], count: int, seed: int) -> Iterator[tuple[Step, ...]]:
    """Other orders in which the actors of ``steps`` could have done the same.

    Each keeps the order of its own steps. What they wait for is in marks: an actor goes over
    ``await:<name>`` only when every ``signal:<name>`` of ``steps`` is done. The order of ``steps``
    itself is not among them: which one that was is chance.
    """
    own: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        own[step.actor].append(step)
    signals = [_told(step, "signal:") for step in steps]
    for number in range(count):
        generator = random.Random(f"{seed} {number}")
        yield tuple(_merged(own, [name for name in signals if name is not None], generator))


def _told(step: Step, prefix: str) -> str | None:
    operation = step.operation
    if isinstance(operation, Mark) and operation.text.startswith(prefix):
        return operation.text.removeprefix(prefix)
    return None


def _merged(
    own: dict[str, list[Step]], signals: Sequence[str], generator: random.Random
) -> Iterator[Step]:
    at = dict.fromkeys(own, 0)
    missing = list(signals)
    while True:
        able = [
            actor
            for actor, position in at.items()
            if position < len(own[actor]) and _told(own[actor][position], "await:") not in missing
        ]
        if not able:
            return
        actor = generator.choice(sorted(able))
        # Runs of one actor, not only a fair mixture.
        for _ in range(generator.choice((1, 1, 2, 5, 20))):
            if at[actor] >= len(own[actor]):
                break
            step = own[actor][at[actor]]
            if _told(step, "await:") in missing:
                break
            signal = _told(step, "signal:")
            if signal is not None:
                missing.remove(signal)
            at[actor] += 1
            yield step
