"""Every call of a save or a load made to fail, on every set of ranks, in every way.

``make test`` runs a pairwise sample of the matrix, ``make torture`` all of it, in parts that can be
asked for one by one: ``make torture PYTEST_ARGS="-k 'whole_matrix and process and 3of8'"``.
"""

from __future__ import annotations

import pytest

from tests.matrix.cases import OPERATIONS, PARTS, Case, full_matrix, part_of, sample
from tests.matrix.run import LANES, run_cases

pytestmark = pytest.mark.multirank

LANES_AT_LENGTH = 12
"""The whole matrix has the machine for itself, and 12 GB of it."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_sample(operation: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = full_matrix([operation])
    _run(operation, sample([case for case in whole if _is_in_reach(case)]), len(whole), capsys)


def _is_in_reach(case: Case) -> bool:
    """Whether a short run may meet it: four ranks and their workers would be ten processes, and
    nobody interrupts or ends a worker by an exception: it takes no such signals."""
    operation = case.site.operation
    if operation.startswith("async") and case.world_size > 2:
        return False
    return operation != "async process" or case.fault not in ("keyboard", "exit")


def test_workers_that_all_died_find_each_other_again() -> None:
    """Each time after the one before: new workers must not look for the dead ones."""
    call = "async process/columns/writer.write_columns"
    name = f"{call}: kill before on all of 2 ranks, coordinator 0"
    (case,) = [case for case in full_matrix(["async process"]) if str(case) == name]
    findings = run_cases([case] * 4, lanes=1)
    assert not findings.wrong, str(findings)


@pytest.mark.torture
@pytest.mark.parametrize("number", range(1, PARTS + 1), ids=lambda number: f"{number}of{PARTS}")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_whole_matrix(operation: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    whole = full_matrix([operation])
    cases = part_of(whole, number)
    _run(f"{operation} {number}of{PARTS}", cases, len(whole), capsys, lanes=LANES_AT_LENGTH)


def _run(
    what: str,
    cases: list[Case],
    whole: int,
    capsys: pytest.CaptureFixture[str],
    *,
    lanes: int = LANES,
) -> None:
    with capsys.disabled():
        print(f"\n{what}: {len(cases)} of {whole} cells ", end="", flush=True)
    findings = run_cases(cases, lanes=lanes)
    if findings.repeated:
        with capsys.disabled():
            print(f"\n{findings}", flush=True)
    assert not findings.wrong, str(findings)
    assert findings.cases == len(cases)
