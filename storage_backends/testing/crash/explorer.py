"""Every crash of a recorded run, and what a reader finds after it.

Belongs here: going through positions and choices, asking a reader about each different image once,
and counting. Does not belong here: which choices there are (``persistence``), and which runs
(``scenarios``).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from storage_backends.testing.crash.operations import Image, Mark, Record, Step, Sync, SyncAll
from storage_backends.testing.crash.persistence import Bounds, DiskAtPosition, choices
from storage_backends.testing.crash.rules import Rule

__all__ = ["Explorer", "Report", "Violation", "scratch_directory", "write_image"]

Reader = Callable[[Path], str]
"""Opens what lies in a directory, and says in a word what it got."""
FollowUp = Callable[[Path, str], str | None]
"""Goes on from an image, of which the reader said that word; what was wrong then, or None."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A crash after which somebody loses something."""

    run: int
    """Which record of the scenario."""
    position: int
    """Steps that were done."""
    last: str
    """The last of them."""
    kept: frozenset[int]
    """Which of the pending units had arrived."""
    pending: int
    found: str
    allowed: tuple[str, ...]
    marks: tuple[str, ...]

    def __str__(self) -> str:
        kept = "all" if len(self.kept) == self.pending else sorted(self.kept)
        return (
            f"run {self.run}, after step {self.position} ({self.last}), arrived {kept} of "
            f"{self.pending}: found {self.found!r}, right would be {' or '.join(self.allowed)} "
            f"(marks: {', '.join(self.marks) or 'none'})"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was tried on one scenario, and what came of it."""

    scenario: str
    runs: int
    operations: int
    states: int
    """Positions times choices."""
    images: int
    """Different ones among them."""
    durable_points: int
    """Steps that made something durable; the state right after each was among those tried."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Words of the reader, by image."""
    followed: int = 0
    """Images from which a next save was tried."""
    violations: tuple[Violation, ...] = ()

    def row(self) -> str:
        """One line."""
        words = ", ".join(f"{word} {n}" for word, n in sorted(self.outcomes.items()))
        return (
            f"{self.scenario:<34} {self.runs:>4} {self.operations:>6} {self.durable_points:>7} "
            f"{self.states:>8} {self.images:>7} {self.followed:>6} {len(self.violations):>4}  "
            f"{words}"
        )

    @staticmethod
    def total(reports: Sequence[Report]) -> Report:
        """The sum of several."""
        return Report(
            scenario="together",
            runs=sum(report.runs for report in reports),
            operations=sum(report.operations for report in reports),
            states=sum(report.states for report in reports),
            images=sum(report.images for report in reports),
            durable_points=sum(report.durable_points for report in reports),
            outcomes=sum((report.outcomes for report in reports), Counter[str]()),
            followed=sum(report.followed for report in reports),
            violations=tuple(found for report in reports for found in report.violations),
        )

    @staticmethod
    def heading() -> str:
        """The line above ``row``."""
        return (
            f"{'scenario':<34} {'runs':>4} {'ops':>6} {'durable':>7} {'states':>8} "
            f"{'images':>7} {'saves':>6} {'bad':>4}  images by what a reader gets"
        )


class Explorer:
    """Explores the runs of one scenario.

    Args:
        name: of the scenario.
        reader: what a reader gets from an image.
        allowed: what is right at a position, by the marks before it.
        follow_up: what must still work on an image; tried on every ``follow_every``-th new one.
        bounds: how many choices at each position.
        seed: of all that is drawn at random.
    """

    def __init__(
        self,
        name: str,
        *,
        reader: Reader,
        allowed: Rule,
        follow_up: FollowUp | None = None,
        follow_every: int = 20,
        bounds: Bounds | None = None,
        seed: int = 0,
    ) -> None:
        self._name = name
        self._reader = reader
        self._allowed = allowed
        self._follow_up = follow_up
        self._follow_every = follow_every
        self._bounds = Bounds() if bounds is None else bounds
        self._seed = seed
        self._found: dict[bytes, str] = {}
        self._outcomes: Counter[str] = Counter()
        self._violations: list[Violation] = []
        self._runs = self._operations = self._states = self._durable = self._followed = 0

    def explore(
        self,
        record: Record,
        orders: Iterable[Sequence[Step]] | None = None,
        *,
        allowed: Rule | None = None,
    ) -> None:
        """Try every crash of ``record``, or of its steps in each of ``orders``; by another rule
        than the scenario's, if one is given."""
        rule = self._allowed if allowed is None else allowed
        for steps in [record.steps] if orders is None else orders:
            self._one(record, steps, rule)
            self._runs += 1

    def _one(self, record: Record, steps: Sequence[Step], rule: Rule) -> None:
        generator = random.Random(f"{self._seed} {self._runs}")
        disk = DiskAtPosition(record)
        marks: list[str] = []
        self._position(disk, 0, "begin", marks, rule, generator)
        for position, step in enumerate(steps, 1):
            disk.advance(step.operation)
            if isinstance(step.operation, Mark):
                marks.append(step.operation.text)
                if not step.operation.text.startswith("returned"):
                    continue
            else:
                self._operations += 1
            self._durable += isinstance(step.operation, Sync | SyncAll)
            self._position(disk, position, _described(step), marks, rule, generator)

    def _position(
        self,
        disk: DiskAtPosition,
        position: int,
        last: str,
        marks: Sequence[str],
        rule: Rule,
        generator: random.Random,
    ) -> None:
        allowed = rule(marks)
        for kept in choices(disk.pending, self._bounds, generator):
            self._states += 1
            found = self._ask(disk.image(kept))
            if found not in allowed:
                self._violations.append(
                    Violation(
                        run=self._runs,
                        position=position,
                        last=last,
                        kept=kept,
                        pending=disk.pending,
                        found=found,
                        allowed=tuple(sorted(allowed)),
                        marks=tuple(marks),
                    )
                )

    def _ask(self, image: Image) -> str:
        digest = image.digest
        if digest not in self._found:
            with scratch_directory() as root:
                write_image(image, root)
                found = self._reader(root)
                number = len(self._found)
                if self._follow_up is not None and number % self._follow_every == 0:
                    self._followed += 1
                    wrong = self._follow_up(root, found)
                    if wrong is not None:
                        found = f"{found}, then {wrong}"
            self._found[digest] = found
            self._outcomes[found] += 1
        return self._found[digest]

    def report(self) -> Report:
        """What was tried so far."""
        return Report(
            scenario=self._name,
            runs=self._runs,
            operations=self._operations,
            states=self._states,
            images=len(self._found),
            durable_points=self._durable,
            outcomes=Counter(self._outcomes),
            followed=self._followed,
            violations=tuple(self._violations),
        )


def _described(step: Step) -> str:
    operation = step.operation
    text = type(operation).__name__
    name = getattr(operation, "to_name", getattr(operation, "name", getattr(operation, "text", "")))
    return f"{text} {name}".strip() + ("" if not step.actor else f" by {step.actor}")


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A new directory in memory where the system has one, else in the usual place."""
    memory = "/dev/shm"
    place = memory if os.access(memory, os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="dcp-engine-crash-", dir=place))
    try:
        yield root
    finally:
        shutil.rmtree(root)


def write_image(image: Image, root: Path) -> None:
    """Put ``image`` into ``root``, which is empty."""
    for path in sorted(image.directories):
        (root / path).mkdir()
    for path, data in image.files.items():
        (root / path).write_bytes(data)
