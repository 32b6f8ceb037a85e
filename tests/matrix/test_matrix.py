"""Every call of a save or a load made to fail, on every set of ranks, in every way.

``make test`` runs a pairwise sample of the matrix, ``make torture`` all of it.
"""

from __future__ import annotations

import pytest

from tests.matrix.cases import OPERATIONS, RAISING, Case, full_matrix, sample
from tests.matrix.run import run_cases

pytestmark = pytest.mark.multirank


@pytest.mark.timeout(900)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_sample(operation: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = full_matrix([operation])
    cells = whole
    if operation.startswith("async"):
        # Hangs and kills of these are in tests/multirank/test_async*; here each costs seconds of
        # starting workers.
        cells = [case for case in whole if case.fault in RAISING and case.world_size < 4]
    if operation == "async process":
        # Nobody interrupts or ends a worker by an exception: it takes no such signals.
        cells = [case for case in cells if case.fault not in ("keyboard", "exit")]
    chosen = sample(cells)
    if operation.startswith("async"):
        chosen = chosen[::3]
    _run(operation, chosen, len(whole), capsys)


@pytest.mark.torture
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_whole_matrix(operation: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = full_matrix([operation])
    _run(operation, whole, len(whole), capsys)


def _run(operation: str, cases: list[Case], whole: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{operation}: {len(cases)} of {whole} cells ", end="", flush=True)
    findings = run_cases(cases)
    assert not findings.wrong, str(findings)
    assert findings.cases == len(cases)
