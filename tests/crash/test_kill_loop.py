"""For real: a saving job is killed at random moments, again and again, on one checkpoint."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

import dcp_engine as dcp
from tests.crash import jobs
from tests.crash.fork_server import Child, ForkServer, Words

pytestmark = pytest.mark.multirank

RANKS = 2
VICTIMS = ((0, 1), (0, 1), (0,), (1,))
"""All ranks as often as one of them."""


class KilledJob:
    """Rounds on one checkpoint: a job saves and saves, is killed, and what is there is looked
    at by another process."""

    def __init__(
        self, server: ForkServer, port: int, directory: Path, generator: random.Random
    ) -> None:
        self._server = server
        self._port = port
        self._directory = directory
        self._generator = generator
        self._round = 0
        self.path = directory / "checkpoint"
        self.committed: float | None = None
        self.outcomes: Counter[str] = Counter()
        self.saves = 0

    def _start(self, words: Words, count: int, timeout: float) -> list[Child]:
        self._round += 1
        first = 0.0 if self.committed is None else self.committed + 1
        return [
            self._server.start(
                jobs.save_for_ever,
                words,
                rank,
                RANKS,
                self._port,
                f"round{self._round}",
                str(self.path),
                first,
                count,
                timeout,
            )
            for rank in range(RANKS)
        ]

    def round(self) -> None:
        """Start, kill, look."""
        words = Words(self._directory / f"words{self._round}")
        children = self._start(words, 10_000, 3.0)
        try:
            self._kill(words, children)
            ended = words.listen(
                lambda: all(child.ended for child in children), 20.0, children=children
            )
            stacks = "" if ended else "\n".join(child.stacks() for child in children)
            assert ended, f"a survivor neither raised nor returned: {words.heard}\n{stacks}"
            words.listen(lambda: False, 0.0)
            self._look(words.heard)
        finally:
            for child in children:
                child.close()
            words.close()

    def _kill(self, words: Words, children: list[Child]) -> None:
        victims = self._generator.choice(VICTIMS)
        # Either in the first save of a process, or a few saves later.
        saves = self._generator.choice((0, 0, 1, 3))
        # On a busy machine a job may run out of time before it has come that far: a round, too.
        begun = words.listen(
            lambda: (
                sum(word[0] == "begins" for word in words.heard) >= RANKS * (saves + 1)
                or all(child.ended for child in children)
            ),
            120.0,
            children=children,
        )
        stacks = "" if begun else "\n".join(child.stacks() for child in children)
        assert begun, f"the job did not start: {words.heard}\n{stacks}"
        # A random moment: nobody is waited for.
        words.listen(lambda: False, self._generator.uniform(0.0, 0.12))
        for victim in victims:
            children[victim].kill()

    def _look(self, heard: list[list[object]]) -> None:
        raised = [word for word in heard if word[0] == "raised"]
        assert not raised, raised
        begun = [float(str(word[2])) for word in heard if word[0] == "begins"]
        returned = [float(str(word[2])) for word in heard if word[0] == "returned"]
        self.outcomes.update(f"survivor: {word[3]}" for word in heard if word[0] == "failed")
        self.saves += len(set(returned))
        found = self.found()
        before = self.committed
        if returned:
            assert found is not None and found >= max(returned), "a save that returned is lost"
        elif before is not None:
            assert found is not None and found >= before, "the checkpoint before it is lost"
        assert found is None or found == before or found in begun, "nobody saved that"
        self.outcomes["new" if found is not None and found in begun else "old"] += 1
        self.committed = found

    def found(self) -> float | None:
        """What a load gets, every byte of it verified."""
        loaded = jobs.destination()
        try:
            dcp.load(loaded, checkpoint_id=self.path, no_dist=True)
        except dcp.CheckpointException as error:
            assert error.kind in ("not_found", "not_committed"), error
            return None
        return jobs.value_of(loaded)

    def undisturbed(self) -> None:
        """A job that nobody kills: it saves, and clears away what the others left."""
        words = Words(self._directory / "words")
        children = self._start(words, 2, 60.0)
        ended = words.listen(
            lambda: all(child.ended for child in children), 60.0, children=children
        )
        assert ended
        words.listen(lambda: False, 0.0)
        assert sum(word[0] == "returned" for word in words.heard) == 2 * RANKS, words.heard
        self._look(words.heard)
        for child in children:
            child.close()
        words.close()


def run(server: ForkServer, port: int, directory: Path, rounds: int, seed: int) -> KilledJob:
    job = KilledJob(server, port, directory, random.Random(seed))
    for _ in range(rounds):
        job.round()
    job.undisturbed()
    # What says whose it is was cleared away by the next save. Killed between making its directory
    # and saying so in it, a save leaves one that nobody but prune may judge.
    committed = json.loads((job.path / "manifest.json").read_bytes())["save_id"]
    owned = [path.parent.name for path in job.path.glob("data-*/owner.json")]
    assert owned == [f"data-{committed}"], f"garbage stays: {sorted(os.listdir(job.path))}"
    dcp.prune(job.path, older_than=-1.0)
    assert sorted(os.listdir(job.path)) == [f"data-{committed}", "manifest.json"]
    assert job.found() == job.committed
    print(
        f"\n{rounds} kills on one checkpoint (seed {seed}), {job.saves} saves returned; "
        f"{dict(sorted(job.outcomes.items()))}; nothing lost, nothing mixed, no garbage left"
    )
    return job


def test_kills_at_random_moments(server: ForkServer, port: int, tmp_path: Path) -> None:
    run(server, port, tmp_path, 15, seed=0)


@pytest.mark.torture
@pytest.mark.parametrize("seed", [1, 2])
def test_many_kills(server: ForkServer, port: int, tmp_path: Path, seed: int) -> None:
    run(server, port, tmp_path, 200, seed)
