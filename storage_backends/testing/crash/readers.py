"""Loads that are overtaken: the checkpoint changes between two requests of a reader.

Belongs here: a store under which a recorded run goes on while it is read, and the loads through
it. Does not belong here: crashes (``scenarios``); nothing is lost here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dcp_engine.loader.random_access import Checkpoint, LazyTensor
from storage_backends.filesystem_store import FileSystemStore
from storage_backends.sharded_reader import ShardedReader
from storage_backends.testing.crash import jobs
from storage_backends.testing.crash.explorer import (
    Report,
    Violation,
    scratch_directory,
    write_image,
)
from storage_backends.testing.crash.operations import Image, Mark, Record
from storage_backends.testing.crash.persistence import DiskAtPosition
from storage_backends.testing.wrapping import WrappingByteStore

__all__ = ["overtaken_loads"]

T = TypeVar("T")
_SUPERSEDED = "error superseded"


class _Film:
    """The images of a run, one a step, of which one lies in a directory."""

    def __init__(self, record: Record) -> None:
        disk = DiskAtPosition(record)
        self.images: list[Image] = [disk.whole()]
        for step in record.steps:
            disk.advance(step.operation)
            if not isinstance(step.operation, Mark):
                self.images.append(disk.whole())
        self.labels: list[str] = []
        for image in self.images:
            with scratch_directory() as root:
                write_image(image, root)
                self.labels.append(jobs.read(root))


class _Showing:
    """A directory in which a film runs from ``at``."""

    def __init__(self, film: _Film, root: Path, at: int) -> None:
        self._film = film
        self._root = root
        self._changes = 0
        self.at = at
        self._show()

    def advance(self, steps: int) -> None:
        """Let the program do that many steps."""
        to = min(self.at + steps, len(self._film.images) - 1)
        if to != self.at:
            self.at = to
            self._show()

    def _show(self) -> None:
        # What was there moves aside, so that a reader's open files stay what they are.
        self._changes += 1
        stage = self._root / f"stage {self._changes}"
        stage.mkdir()
        write_image(self._film.images[self.at], stage)
        place, made = self._root / jobs.CHECKPOINT, stage / jobs.CHECKPOINT
        if place.exists():
            place.rename(self._root / f"gone {self._changes}")
        if made.exists():
            place.parent.mkdir(exist_ok=True)
            made.rename(place)


class _OvertakenStore(WrappingByteStore):
    """Reads from the directory of a showing, which goes on before each request.

    ``whole``: a small file is got by one request, as from a descriptor; else by one for its size
    and one for its bytes, as from an object store.
    """

    def __init__(
        self, showing: _Showing, path: Path, steps: Callable[[], int], whole: bool
    ) -> None:
        super().__init__(FileSystemStore(path))
        self._showing = showing
        self._steps = steps
        self._whole = whole

    def around(self, operation: str, name: str, call: Callable[[], T]) -> T:
        self._showing.advance(self._steps())
        return call()

    def get(self, name: str, *, limit: int | None = None) -> bytes:
        if not self._whole:
            return super().get(name, limit=limit)
        return self.around("get", name, lambda: self.inner.get(name, limit=limit))


def overtaken_loads(name: str, record: Record, *, loads: int, seed: int) -> Report:
    """Load while the run of ``record`` goes on, ``loads`` times, each from another point and at
    another pace; every second one by random access, which opens first and reads later.

    Right is a label that was committed between the begin and the end of the load, whole; a random
    access may also say that it was superseded, and so may a load that was overtaken each time it
    started over.
    """
    film = _Film(record)
    generator = random.Random(f"{seed} loads")
    outcomes: Counter[str] = Counter()
    violations: list[Violation] = []
    positions: set[tuple[int, int]] = set()
    for number in range(loads):
        begin = generator.randrange(len(film.images))
        with scratch_directory() as root:
            showing = _Showing(film, root, begin)
            path = root / jobs.CHECKPOINT
            pace = _pace(generator, len(film.images))
            store = _OvertakenStore(showing, path, pace, whole=generator.random() < 0.7)
            if number % 2:
                found = jobs.outcome_of(lambda: _by_random_access(store, path))  # noqa: B023
            else:
                found = jobs.read(root, store=store)
        seen = film.labels[begin : showing.at + 1]
        allowed = {*seen, *([_SUPERSEDED] if len(set(seen)) > 1 else [])}
        outcomes[found] += 1
        positions.add((begin, showing.at))
        if found not in allowed:
            violations.append(
                Violation(
                    run=number,
                    position=begin,
                    last=f"load while the run went on to {showing.at}",
                    kept=frozenset(),
                    pending=0,
                    found=found,
                    allowed=tuple(sorted(allowed)),
                    marks=(),
                )
            )
    return Report(
        scenario=name,
        runs=loads,
        operations=len(film.images) - 1,
        states=loads,
        images=len(positions),
        durable_points=0,
        outcomes=outcomes,
        violations=tuple(violations),
    )


def _pace(generator: random.Random, images: int) -> Callable[[], int]:
    """How far the run goes between two requests: a leap at one of them, or a little at each."""
    if generator.random() < 0.5:
        due = generator.randrange(12)
        leap = generator.randrange(1, images)
        requests = iter(range(1000))
        return lambda: leap if next(requests) == due else 0
    most = generator.choice((1, 2, 3, 8))
    return lambda: generator.randrange(most + 1)


def _by_random_access(store: WrappingByteStore, path: Path) -> str:
    state = jobs.content(None)
    reader = ShardedReader(lambda _: store, path, thread_count=1)
    with Checkpoint(reader, path) as checkpoint:
        for key in state:
            stored = checkpoint[key]
            state[key] = stored[...] if isinstance(stored, LazyTensor) else stored.load()
    return jobs.label_of(state)
