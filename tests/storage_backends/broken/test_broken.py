"""A contract is worth what it catches: what is broken must fail the check meant for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from storage_backends.testing import (
    ByteStoreContract,
    StorageReaderContract,
    StorageWriterContract,
)
from tests.storage_backends.broken.stores import CAUGHT_BY
from tests.storage_backends.broken.writers import READERS_CAUGHT_BY, WRITERS_CAUGHT_BY

HERE = Path(__file__).parent
STORES = "contract_of_stores.py"
WRITERS = "contract_of_writers.py"
CASES = [
    (file, broken.__name__, check)
    for file, table in (
        (STORES, CAUGHT_BY),
        (WRITERS, WRITERS_CAUGHT_BY),
        (WRITERS, READERS_CAUGHT_BY),
    )
    for broken, checks in table.items()
    for check in checks
]
NOT_FOR_THE_SOUND_ONE = {
    "test_an_offset_out_of_order_is_refused",  # its random_write is true
    "test_a_flipped_bit_is_noticed",  # it has no digests
}

Outcomes = dict[tuple[str, str, str], set[str]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What became of every case, and of the same checks on something sound, in one run."""
    report = tmp_path_factory.mktemp("broken") / "report.xml"
    chosen = [f"{HERE / file}::Test{broken}::{check}" for file, broken, check in CASES]
    sound = dict.fromkeys((file, check) for file, _, check in CASES)
    chosen += [f"{HERE / file}::TestSound::{check}" for file, check in sound]
    options = ["-q", "--tb=line", "-p", "no:cacheprovider", "-n", "0", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *chosen],
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=250,
        # With CI set pytest prints whole differences; nobody reads them here.
        env={
            name: value for name, value in os.environ.items() if name not in ("CI", "BUILD_NUMBER")
        },
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        *_, file, broken = case.attrib["classname"].split(".")
        check = case.attrib["name"]
        outcome = next((child.tag for child in case if child.tag != "system-out"), "passed")
        for name in {check, check.partition("[")[0]}:
            key = f"{file}.py", broken.removeprefix("Test"), name
            found.setdefault(key, set()).add(outcome)
    return found


@pytest.mark.parametrize(("file", "broken", "check"), CASES)
def test_is_caught(outcomes: Outcomes, file: str, broken: str, check: str) -> None:
    assert "failure" in outcomes[file, broken, check]


def test_the_same_checks_pass_for_what_is_sound(outcomes: Outcomes) -> None:
    for file, _, check in CASES:
        wanted = "skipped" if check in NOT_FOR_THE_SOUND_ONE else "passed"
        assert outcomes[file, "Sound", check] == {wanted}, check


def checks(contract: type) -> set[str]:
    return {name for name in dir(contract) if name.startswith("test_")}


def test_no_check_hides_another() -> None:
    """Both contracts may be derived from at once."""
    assert not checks(StorageWriterContract) & checks(StorageReaderContract)


def test_every_check_catches_something() -> None:
    caught = {check.partition("[")[0] for _, _, check in CASES}
    contracts = (ByteStoreContract, StorageWriterContract, StorageReaderContract)
    assert set().union(*map(checks, contracts)) - caught == {
        # What is broken here lives in one process.
        "test_another_process_sees_it",
        # The engine has a word in it too: it misses keys that a reader does not have.
        "test_nothing_there_through_the_engine",
    }
