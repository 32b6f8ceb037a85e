"""Runs cases on ranks, several groups of ranks at a time, and collects what is wrong.

    python -m tests.matrix.run save load --sample            # what `make test` runs
    python -m tests.matrix.run save --only "commit_columns"  # some cells of the whole matrix
    python -m tests.matrix.run "async process" --part 3      # an eighth of it

Belongs here: who runs what when. Does not belong here: cases and verdicts.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.matrix import in_ranks
from tests.matrix.cases import OPERATIONS, PARTS, Case, full_matrix, part_of, sample
from tests.matrix.verdict import complaints
from tests.multirank.pool import RankPool, RanksFailed

__all__ = ["Findings", "run_cases"]

LANES = 6
"""Groups of ranks that run cases at the same time: most of a case is waiting for a deadline."""
BATCH = 12
"""Cases over one process group, where none of its ranks dies."""


@dataclass
class Findings:
    """What came of a set of cases."""

    cases: int = 0
    seconds: float = 0.0
    wrong: list[tuple[Case, list[str]]] = field(default_factory=list)
    cleaned_by: Counter[str] = field(default_factory=Counter)
    """Leftovers, by what removed them: ``"save"`` or ``"prune"``."""
    repeated: list[tuple[int, str]] = field(default_factory=list)
    """Batches in which a process got lost, and whose cases were run again one by one: how many
    cases, and what the ranks said."""

    def __str__(self) -> str:
        lines = [f"{self.cases} cases in {self.seconds:.0f} s, {len(self.wrong)} wrong"]
        lines.append(
            f"leftovers removed by the next save {self.cleaned_by['save']}, "
            f"by prune {self.cleaned_by['prune']}"
        )
        for cases, text in self.repeated:
            lines.append(f"\n{cases} cases run again one by one, because together:")
            lines.extend(f"    {line}" for line in text.splitlines())
        for case, texts in self.wrong:
            lines.append(f"\n{case}")
            lines.extend(f"    {line}" for text in texts for line in text.splitlines())
        return "\n".join(lines)


def run_cases(
    cases: Sequence[Case], *, lanes: int = LANES, until: float | None = None, verbose: bool = False
) -> Findings:
    """Run ``cases``; none begins after ``until``, by the monotonic clock."""
    findings, began = Findings(), time.monotonic()
    work = iter(_batches(cases))
    lock = threading.Lock()

    def live() -> None:
        pool = RankPool()
        try:
            while until is None or time.monotonic() < until:
                with lock:
                    batch = next(work, None)
                if batch is None:
                    return
                results, lost = _run_batch(pool, batch)
                if lost:
                    with lock:
                        findings.repeated.append((len(batch), lost))
                for case, texts, cleaned in results:
                    with lock:
                        findings.cases += 1
                        findings.cleaned_by[cleaned] += 1
                        if texts:
                            findings.wrong.append((case, texts))
                            if verbose:
                                print(case, *texts, sep="\n    ", flush=True)
                        if verbose and findings.cases % 250 == 0:
                            seconds = time.monotonic() - began
                            print(f"{findings.cases} cells in {seconds:.0f} s", flush=True)
        finally:
            pool.close()

    with ThreadPoolExecutor(lanes) as threads:
        for done in [threads.submit(live) for _ in range(lanes)]:
            done.result()
    findings.seconds = time.monotonic() - began
    return findings


def _batches(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases of one world size together, each that kills for itself; the slow ones first."""
    kills = [[case] for case in cases if case.dies]
    rest: list[list[Case]] = []
    # One kind of operation in a batch: an engine that has a worker keeps it.
    operations = sorted({case.site.operation for case in cases})
    for hangs, size, operation in itertools.product((True, False), (4, 2, 1), operations):
        alike = [
            case
            for case in cases
            if not case.dies
            and (case.world_size, case.fault == "hang", case.site.operation)
            == (size, hangs, operation)
        ]
        rest.extend(alike[at : at + BATCH] for at in range(0, len(alike), BATCH))
    # Idle waits and work side by side.
    mixed = [batch for pair in itertools.zip_longest(kills, rest) for batch in pair if batch]
    return mixed


Result = tuple[Case, list[str], str]


def _run_batch(pool: RankPool, batch: list[Case]) -> tuple[list[Result], str]:
    """What came of each case; and what the ranks said if they had to be run one by one, because a
    process got lost and the others' results with it."""
    root = tempfile.mkdtemp(prefix="dcp-engine-matrix-")
    try:
        run = _run_kill if batch[0].dies else _run_survivors
        return run(pool, batch, root), ""
    except RanksFailed as error:
        if len(batch) == 1:
            return [(batch[0], [str(error)], "")], ""
        results = [result for case in batch for result in _run_batch(pool, [case])[0]]
        return results, str(error)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _run_survivors(pool: RankPool, batch: list[Case], root: str) -> list[Result]:
    timeout = 60.0 + sum(5.0 + in_ranks.hang_of(case) for case in batch)
    reports = pool.run(batch[0].world_size, in_ranks.survived, batch, root, timeout=timeout)
    results = []
    for number, case in enumerate(batch):
        seen = [of_rank[number] for of_rank in reports]
        texts = complaints(case, f"{root}/control-{number}", seen, seen)
        results.append((case, texts, _cleaned_by(seen[0])))
    return results


def _run_kill(pool: RankPool, batch: list[Case], root: str) -> list[Result]:
    (case,) = batch
    doomed = _doomed(case)
    during: Sequence[Any] = [None] * case.world_size
    died = ""
    try:
        during = pool.run(
            case.world_size,
            in_ranks.killed,
            case,
            root,
            # Those whose death the others are to survive; nobody waits for a last survivor.
            expect_kill=doomed if len(doomed) < case.world_size else (),
            host_in_rank=case.host,
            timeout=60.0,
        )
    except RanksFailed as error:
        if len(doomed) < case.world_size:
            raise
        died = str(error)
    afterwards = pool.run(case.world_size, in_ranks.recover, root)
    texts = complaints(case, f"{root}/control-0", during, afterwards)
    if texts and died:
        texts.append(died)  # of something else than the fault
    return [(case, texts, _cleaned_by(afterwards[0]))]


def _doomed(case: Case) -> list[int]:
    """Who is killed: in a call that ranks make in different steps, the first of them alone."""
    if case.subset == "all" and not case.site.together:
        return [case.coordinator]
    return list(case.ranks)


def _cleaned_by(report: dict[str, Any]) -> str:
    if len(report["saved"]) > 2:
        return "prune"
    return "save" if len(report["files"]) > 2 else ""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operations", nargs="*", default=[*OPERATIONS])
    parser.add_argument("--sample", action="store_true", help="the pairwise sample only")
    parser.add_argument("--part", type=int, choices=range(1, PARTS + 1), help="this part only")
    parser.add_argument("--only", default="", help="cells whose names hold this")
    parser.add_argument("--lanes", type=int, default=LANES)
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--cells", type=int, help="only so many, drawn by the seed")
    parser.add_argument("--seconds", type=float, help="begin no case after so long")
    options = parser.parse_args()
    whole = full_matrix(options.operations)
    cases = sample(whole) if options.sample else whole
    if options.part:
        cases = part_of(cases, options.part)
    cases = [case for case in cases if options.only in str(case)]
    random.Random(options.seed).shuffle(cases)
    cases = cases[: options.cells]
    print(f"{len(cases)} of {len(whole)} cases", flush=True)
    until = time.monotonic() + options.seconds if options.seconds else None
    findings = run_cases(cases, lanes=options.lanes, until=until, verbose=True)
    print(findings)
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
