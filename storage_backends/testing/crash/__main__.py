"""``python -m storage_backends.testing.crash``: crash the engine's saves, print what came of it."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from storage_backends.testing.crash.explorer import Report
from storage_backends.testing.crash.scenarios import SCENARIOS, Budget


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m storage_backends.testing.crash")
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="the bounds of the test suite")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.scenario if name not in SCENARIOS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    # Saves that are made to fail log what they could not tidy up.
    for package in ("dcp_engine", "storage_backends"):
        logging.getLogger(package).addHandler(logging.NullHandler())
    budget = replace(Budget() if arguments.quick else Budget.long(), seed=arguments.seed)
    began = time.monotonic()
    reports: list[Report] = []
    print(Report.heading())
    for name in arguments.scenario or SCENARIOS:
        reports.append(SCENARIOS[name](budget))
        print(reports[-1].row(), flush=True)
    print(Report.total(reports).row(), f" in {time.monotonic() - began:.0f} s")
    violations = [found for report in reports for found in report.violations]
    for violation in violations[:50]:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
