"""What the scenarios share: how far to go, recording a run, and what must work after a crash.

Belongs here: helpers. Does not belong here: any scenario.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dcp_engine.errors import CheckpointException
from storage_backends.prune import prune
from storage_backends.testing.crash import jobs
from storage_backends.testing.crash.explorer import Explorer, Report, scratch_directory
from storage_backends.testing.crash.interception import recording
from storage_backends.testing.crash.operations import Record
from storage_backends.testing.crash.persistence import Bounds
from storage_backends.testing.crash.recorder import Fault, Recorder
from storage_backends.testing.crash.rules import Rule

__all__ = [
    "Budget",
    "Scenario",
    "explorer_of",
    "goes_on",
    "marked",
    "nothing",
    "operations_of",
    "record_of",
    "save_new",
    "save_old",
]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far to go."""

    bounds: Bounds = field(default_factory=lambda: Bounds(exhaustive=5, pairs=7, random=6))
    orders: int = 2
    """Orders of what several ranks or savers do."""
    overtaken: Sequence[int] = (5, 40)
    """After how many turns of the first of several savers the others run to their ends."""
    every: int = 3
    """Each how-manieth operation is made to fail, in the scenarios of saves that fail."""
    every_kill: int = 6
    """Before each how-manieth operation a save is killed, in the scenarios of killed saves."""
    all_deaths: bool = False
    """Whether a worker is killed before each of its operations, or before one."""
    starts: int = 6
    """Crashed disks from which a next save is recorded and crashed again."""
    loads: int = 150
    """Loads that are overtaken by a save."""
    follow_every: int = 40
    """After each how-manieth image a next save is done for real."""
    seed: int = 0

    @staticmethod
    def long() -> Budget:
        """For a run of half an hour."""
        return Budget(
            bounds=Bounds(exhaustive=9, pairs=16, random=64),
            orders=30,
            overtaken=range(180),
            every=1,
            every_kill=1,
            all_deaths=True,
            starts=60,
            loads=5000,
            follow_every=10,
        )


Scenario = Callable[[Budget], Report]


def goes_on(root: Path, found: str) -> str | None:
    """After a crash: the next save to that place works, and prune leaves nothing behind it."""
    jobs.save_alone(root, "next")
    if (got := jobs.read(root)) != "next":
        return f"a next save left {got!r}"
    prune(root, older_than=-1.0)
    if (got := jobs.read(root)) != "next":
        return f"prune left {got!r}"
    left = sorted(path.name for path in (root / jobs.CHECKPOINT).iterdir())
    if len(left) != 2 or left[1] != "manifest.json":
        return f"prune left {left}"
    return None


def explorer_of(
    name: str, rule: Rule, budget: Budget, reader: Callable[[Path], str] = jobs.read
) -> Explorer:
    """An explorer of the engine's checkpoints, within ``budget``."""
    return Explorer(
        name,
        reader=reader,
        allowed=rule,
        follow_up=goes_on,
        follow_every=budget.follow_every,
        bounds=budget.bounds,
        seed=budget.seed,
    )


def record_of(
    prepare: Callable[[Path], None],
    run: Callable[[Path, Recorder], None],
    *,
    before: Callable[[], None] | None = None,
    fault: Fault | None = None,
    seed: int = 0,
) -> Record:
    """What ``run`` does after ``prepare``, which is durable."""
    with scratch_directory() as root, jobs.frozen(seed):
        prepare(root)
        recorder = Recorder(root, before=before, fault=fault)
        with recording(recorder):
            run(root, recorder)
        return recorder.record()


def operations_of(
    prepare: Callable[[Path], None], run: Callable[[Path, Recorder], None]
) -> list[str]:
    """The kinds of all operations that ``run`` asks for, as a fault is told of them; those that
    fail by themselves and leave no step in the record are among them."""
    kinds: list[str] = []

    def notes(kind: str) -> None:
        kinds.append(kind)

    record_of(prepare, run, fault=notes)
    return kinds


def nothing(root: Path) -> None:
    """Nothing is there before."""
    return None


def save_old(root: Path) -> None:
    """A checkpoint is there before."""
    jobs.save_alone(root, "old")


def save_new(root: Path, recorder: Recorder, *, label: str = "new") -> None:
    """A save, marked by how it ended."""
    with marked(recorder, label):
        jobs.save_alone(root, label)


@contextmanager
def marked(recorder: Recorder, label: str) -> Iterator[None]:
    """The end of a save, as whoever called it is told."""
    try:
        yield
    except CheckpointException as error:
        word = "doubt" if error.kind == "commit_in_doubt" else "failed"
        recorder.mark(f"{word}:{label}")
    else:
        recorder.mark(f"returned:{label}")
